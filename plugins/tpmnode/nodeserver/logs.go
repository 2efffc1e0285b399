package nodeserver

import (
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// minChunk is the least in bytes that an agent may send at once of what is
// left of a log; single bytes would keep a session busy for hours.
const minChunk = 64 << 10

// eventLogs collects the logs that were asked for. Only an agent whose TPM has
// answered gets this far. A log proves nothing by itself: the event log counts
// once it replays to the quoted values, and of the IMA log only the digest is
// kept, as what the agent said.
func (s *session) eventLogs() error {
	if size := s.proof.EventLogSize; s.settings.wantEventLog && size > 0 {
		if held := s.p.logs.Add(int64(size)); held > maxLogBytes {
			s.p.logs.Add(-int64(size))
			return unavailable("busy", "too many logs are being read", nil)
		}
		s.heldBytes = int64(size)
		log := make([]byte, 0, size)
		if err := s.chunks(tpmv1.LogKind_LOG_KIND_EVENT_LOG, size, func(b []byte) { log = append(log, b...) }); err != nil {
			return err
		}
		if err := s.replay(log); err != nil {
			return err
		}
	} else if s.settings.requireEventLog {
		return denied("event_log", "a boot event log is required here", nil)
	}
	if size := s.proof.ImaLogSize; s.settings.wantIMALog && size > 0 {
		h := sha256.New()
		if err := s.chunks(tpmv1.LogKind_LOG_KIND_IMA, size, func(b []byte) { h.Write(b) }); err != nil {
			return err
		}
		s.out.IMALogDigest = &attest.TypedDigest{Alg: "sha256", Value: h.Sum(nil)}
	}
	return nil
}

func (s *session) chunks(kind tpmv1.LogKind, size uint64, take func([]byte)) error {
	for offset := uint64(0); offset < size; {
		m, err := s.ask(fmt.Sprintf("log chunk %d", offset), &tpmv1.ServerMessage{Step: &tpmv1.ServerMessage_LogRequest{
			LogRequest: &tpmv1.LogRequest{Kind: kind, Offset: offset},
		}}, wire.MaxLogReply)
		if err != nil {
			return err
		}
		c, left := m.GetLogChunk(), size-offset
		switch {
		case c == nil || c.Kind != kind || c.Offset != offset:
			return invalid("log", "log chunk is not the one asked for", nil)
		case uint64(len(c.Data)) > left:
			return invalid("too_large", "log is longer than announced", nil)
		case uint64(len(c.Data)) < min(left, minChunk):
			return invalid("log", "log chunk is too small", fmt.Errorf("%d bytes of %d left", len(c.Data), left))
		}
		take(c.Data)
		offset += uint64(len(c.Data))
	}
	return nil
}

// replay checks the log against the quoted values. One that does not replay
// proves nothing; it is kept for whoever looks into it, and where a log is
// required it is as good as none.
func (s *session) replay(log []byte) error {
	s.out.EventLog, s.out.EventLogDigest = log, attest.EventLogDigest(log)
	claims, err := attest.ReplayEventLog(log, s.out.PCRs)
	if err == nil && claims == nil {
		err = errors.New("no claims")
	}
	switch {
	case err == nil:
		s.out.Replayed, s.out.SecureBoot = true, claims.SecureBoot
	case s.settings.requireEventLog:
		return denied("event_log", "boot event log does not replay", err)
	default:
		s.p.log.Warn("boot event log does not replay to the quoted PCRs: no Secure Boot claim", "agent_id", s.agentID, "error", err.Error())
	}
	return nil
}
