package server

import (
	"context"
	"time"

	"github.com/rootlink/rootlink/internal/tsa"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// tsaRetry is how soon the timestamp key's rotation is tried again, and
// tsaCheck how often the clock is looked at, which may have been set.
const (
	tsaRetry = time.Minute
	tsaCheck = time.Hour
)

// openTSA opens the timestamp authority. Without an HTTP port none is made, but
// one that was there is kept: its tokens are still to be verified.
func (s *Server) openTSA() error {
	if s.cfg.HTTPListen == "" {
		if had, err := tsa.Exists(s.cfg.DataDir); err != nil || !had {
			return err
		}
	}
	var err error
	s.tsa, err = tsa.Open(tsa.Config{Dir: s.cfg.DataDir, Name: s.cfg.TrustDomain, Now: s.cfg.Now, Log: s.cfg.Log})
	return err
}

// maintainTSA rotates its key until ctx ends.
func (s *Server) maintainTSA(ctx context.Context) {
	for {
		wait := tsaRetry
		if again, err := s.tsa.Maintain(); err != nil {
			s.cfg.Log.Error("rotation of the timestamp key failed", "error", err, "retry_in", wait)
		} else {
			wait = min(max(again.Sub(s.cfg.Now()), time.Second), tsaCheck)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// TimestampAuthorities are what verifiers must trust to accept every token that
// this server ever made, nil when it makes none.
func (s *Server) TimestampAuthorities() []timestamp.Authority {
	if s.tsa == nil {
		return nil
	}
	list := s.tsa.Authorities()
	for i := range list {
		list[i].Operator = s.cfg.TrustDomain
		for _, u := range s.timestampURLs() {
			list[i].URI = u
		}
	}
	return list
}

// timestampURLs are where this server's timestamp authority answers.
func (s *Server) timestampURLs() []string {
	if s.tsa == nil || s.http == nil {
		return nil
	}
	return []string{s.HTTPURL() + "/tsa"}
}
