package server

import (
	"errors"

	"github.com/rootlink/rootlink/pkg/attest"
)

// EKRoots returns what makes an endorsement key genuine, as the node attestor
// judges it now; trust.json carries it to verifiers.
func (s *Server) EKRoots() (attest.EKRoots, error) {
	return attest.EKRoots{}, errors.New("no node attestor")
}
