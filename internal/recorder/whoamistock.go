package recorder

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// Whoami says what a SPIRE agent gives, and what the quoter socket measures.
func (s *stock) Whoami(ctx context.Context, e *Exec) (*workloadv1.WhoamiResponse, error) {
	resp := &workloadv1.WhoamiResponse{Notes: []string{
		"this is a SPIRE agent's socket: the identity is that of rootlink itself, whatever the tool; which tools an identity may use is said in trust.json",
	}}
	var err error
	if resp.Measurement, err = s.look(ctx, e, resp); err != nil {
		return nil, err
	}
	have, err := s.svids(ctx)
	if ae, ok := errors.AsType[*AgentError](err); ok && ae.Code == codes.PermissionDenied {
		err = nil // no identity, which is what we are asked to explain
	}
	if err != nil {
		return nil, err
	}
	for _, v := range have {
		m := &workloadv1.Match{SpiffeId: v.GetSpiffeId()}
		if _, err := readSVID(v); err != nil {
			m.Refusal = err.Error()
		}
		resp.Matches = append(resp.Matches, m)
		if rest, ok := strings.CutPrefix(v.GetSpiffeId(), "spiffe://"); ok && resp.TrustDomain == "" {
			resp.TrustDomain, _, _ = strings.Cut(rest, "/")
		}
	}
	resp.EntryCreate = s.entryCreate(resp)
	resp.Notes = append(resp.Notes, "AGENT_ID in the command is this node's ID or alias; on the server, `spire-server agent list` prints the IDs")
	return resp, nil
}

// look has the quoter socket measure; without one, or without a tool, which it
// would refuse, rootlink looks at itself.
func (s *stock) look(ctx context.Context, e *Exec, resp *workloadv1.WhoamiResponse) (*workloadv1.Measurement, error) {
	if s.quoter != nil && e != nil {
		seen, err := s.voucher.Measure(withHeader(ctx), &workloadv1.MeasureRequest{})
		if err != nil {
			return nil, s.voucherError(err)
		}
		resp.TrustDomain = seen.GetTrustDomain()
		return seen.GetMeasurement(), nil
	}
	why := "the quoter socket measures steps: give it a COMMAND"
	if s.quoter == nil {
		why = "no quoter socket answers, so nothing signed here would have evidence"
	}
	resp.Notes = append(resp.Notes, "measured by rootlink itself, since "+why)
	self, err := ownHash()
	if err != nil {
		return nil, err
	}
	m := &workloadv1.Measurement{Executable: self[:], Selectors: []string{
		attest.SelectorExecutable + hex.EncodeToString(self[:]),
		fmt.Sprintf("binary:gid:%d", os.Getgid()), fmt.Sprintf("binary:uid:%d", os.Getuid()),
	}}
	if e != nil {
		tool, err := e.HashExecutable()
		if err != nil {
			return nil, err
		}
		m.Tool, m.Recorder, m.UnprotectedReason = tool[:], self[:], "nobody else looked"
		m.Selectors = append(m.Selectors, attest.SelectorTool+hex.EncodeToString(tool[:]), attest.SelectorUnprotectedRecorder+hex.EncodeToString(self[:]))
	}
	slices.Sort(m.Selectors)
	return m, nil
}

// entryCreate names what the agent's own plugin sees of whoever asks: the
// program, rootlink, and its user. Tools and recorders are no selectors there.
func (s *stock) entryCreate(r *workloadv1.WhoamiResponse) string {
	td := r.GetTrustDomain()
	if td == "" {
		td = "TRUST-DOMAIN"
	}
	name := "rootlink"
	if self, err := os.Readlink("/proc/self/exe"); err == nil && spiffeSegment(filepath.Base(self)) {
		name = filepath.Base(self)
	}
	line := fmt.Sprintf("spire-server entry create -spiffeID spiffe://%s/workload/%s -parentID AGENT_ID", td, name)
	for _, sel := range r.GetMeasurement().GetSelectors() {
		if strings.HasPrefix(sel, attest.SelectorExecutable) || strings.HasPrefix(sel, "binary:uid:") {
			line += " -selector " + sel
		}
	}
	return line
}

// spiffeSegment: what may stand in the path of a SPIFFE ID.
func spiffeSegment(s string) bool {
	return s != "" && s != "." && s != ".." && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
	})
}
