package attest

import "time"

// NonceMaker makes and checks the nonces of rootlink.node.v1:
// u64be(unix ms) ‖ HMAC-SHA-256(key, "rootlink/nonce/v1\0" ‖ time ‖ lp(agent ID))[:24].
type NonceMaker struct{ key [32]byte }

// NewNonceMaker returns a maker for a per-process secret key.
func NewNonceMaker(key [32]byte) *NonceMaker { return &NonceMaker{key: key} }

// Make returns the nonce for agentID at now.
func (m *NonceMaker) Make(agentID string, now time.Time) [32]byte { return [32]byte{} }

// Check fails unless nonce was made by m for agentID within NonceLifetime before now.
func (m *NonceMaker) Check(nonce [32]byte, agentID string, now time.Time) error {
	return errNotImplemented
}

// NonceTime returns the time inside a nonce of Kind leaf.
func NonceTime(nonce [32]byte) time.Time { return time.Time{} }
