package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/rootlink/rootlink/internal/tsa"
)

// TSAConfig is what a timestamp authority without a server is made from. Name,
// DataDir and Listen are required.
type TSAConfig struct {
	Name    string // for people who read its certificates
	DataDir string // made with mode 0700 when absent
	Listen  string // TCP address; port 0 picks one
	Log     *slog.Logger
	Now     func() time.Time
}

// TSA is the timestamp authority alone, for who issues SVIDs with another
// server: the same HTTP port, limits and files.
type TSA struct{ s *Server }

// NewTSA locks the data directory, opens or makes the authority and its port.
func NewTSA(c TSAConfig) (_ *TSA, err error) {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Name == "" || c.DataDir == "" || c.Listen == "" {
		return nil, fmt.Errorf("%w: a timestamp authority needs a name, a data directory and an address", ErrConfig)
	}
	cfg := &settings{Config: Config{
		TrustDomain: c.Name, DataDir: c.DataDir, HTTPListen: c.Listen,
		MaxConnections: maxHTTPConns, MaxConnectionsOfAddress: maxHTTPConnsOfAddress,
		Log: c.Log, Now: c.Now,
	}}
	// Nobody is told this address: whoever uses it names it.
	cfg.HTTPURL = "http://" + c.Listen
	if err := cfg.checkHTTP(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	dir, err := openDataDir(c.DataDir)
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, dir: dir}
	if err = s.openTSA(); err == nil {
		err = s.listenHTTP()
	}
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return &TSA{s}, nil
}

// Addr is where it answers.
func (t *TSA) Addr() net.Addr { return t.s.http.Addr() }

// Run serves until ctx ends or the port fails, and releases everything.
func (t *TSA) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	web, done, failed := t.s.newHTTP(), make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(done)
		t.s.maintainTSA(ctx)
	}()
	go func() { failed <- web.Serve(t.s.http) }()
	var err error
	select {
	case <-ctx.Done():
		stopHTTP(web)
		<-failed
	case err = <-failed:
	}
	cancel()
	<-done
	return errors.Join(err, t.s.dir.Close())
}

// ReadTSA returns the certificates of the authority in a data directory, running
// or not: in PEM, the root first.
func ReadTSA(dir string) ([]byte, error) { return tsa.ReadCertificates(dir) }
