// Package server issues SVIDs. It speaks SPIRE's Server API and our node
// service on TCP, and the same with full rights on a Unix socket that only its
// own user can open.
package server

import (
	"context"
	"errors"
	"net"

	"github.com/rootlink/rootlink/internal/store"
)

// Server is a trust domain's server. Make one with New, then call Run.
type Server struct {
	cfg   *settings
	store *store.Store
}

var errNotImplemented = errors.New("server: not implemented")

// New checks c, locks and opens the data directory, makes or loads keys and
// opens both listeners. Nothing is served before Run.
func New(ctx context.Context, c Config) (*Server, error) {
	if _, err := c.check(); err != nil {
		return nil, err
	}
	return nil, errNotImplemented
}

// Run serves until ctx ends or a listener fails, and then releases everything.
func (s *Server) Run(ctx context.Context) error { return errNotImplemented }

// Close releases everything without Run having been called. After Run it does
// nothing.
func (s *Server) Close() error { return nil }

// Addr is the TCP address that is listened on, with its real port.
func (s *Server) Addr() net.Addr { return nil }

// Store is what the server keeps.
func (s *Server) Store() *store.Store { return s.store }

// TrustDomain is the name of the trust domain.
func (s *Server) TrustDomain() string { return s.cfg.TrustDomain }
