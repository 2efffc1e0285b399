package attest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Reasons why a nonce is refused.
var (
	ErrNonceForeign = errors.New("nonce was not made by this server for this agent")
	ErrNonceExpired = errors.New("nonce is too old")
	ErrNonceFuture  = errors.New("nonce is from the future")
)

// NonceMaker makes and checks the nonces of rootlink.node.v1:
// u64be(unix ms) ‖ HMAC-SHA-256(key, "rootlink/nonce/v1\0" ‖ time ‖ lp(agent ID))[:24].
type NonceMaker struct{ key [32]byte }

// NewNonceMaker returns a maker for a per-process secret key.
func NewNonceMaker(key [32]byte) *NonceMaker { return &NonceMaker{key: key} }

// Make returns the nonce for agentID at now.
func (m *NonceMaker) Make(agentID string, now time.Time) [32]byte {
	return m.at(agentID, uint64(now.UnixMilli()))
}

func (m *NonceMaker) at(agentID string, ms uint64) (n [32]byte) {
	binary.BigEndian.PutUint64(n[:8], ms)
	h := hmac.New(sha256.New, m.key[:])
	h.Write([]byte(nonceLabel))
	h.Write(n[:8])
	h.Write(appendLP(nil, agentID))
	copy(n[8:], h.Sum(nil))
	return n
}

// Check fails unless nonce was made by m for agentID within NonceLifetime before now.
func (m *NonceMaker) Check(nonce [32]byte, agentID string, now time.Time) error {
	want := m.at(agentID, binary.BigEndian.Uint64(nonce[:8]))
	if !hmac.Equal(want[:], nonce[:]) {
		return ErrNonceForeign
	}
	switch age := now.Sub(NonceTime(nonce)); {
	case age > NonceLifetime:
		return fmt.Errorf("%w: %v old, at most %v", ErrNonceExpired, age.Round(time.Millisecond), NonceLifetime)
	case age <= -time.Millisecond: // the nonce is cut to milliseconds, so it never lies ahead by itself
		return ErrNonceFuture
	}
	return nil
}

// NonceTime returns the time inside a nonce of Kind leaf. A value that is not
// a time of this era (over 2^48 ms) gives the zero time, which no check accepts.
func NonceTime(nonce [32]byte) time.Time {
	ms := binary.BigEndian.Uint64(nonce[:8])
	if ms >= 1<<48 {
		return time.Time{}
	}
	return time.UnixMilli(int64(ms)).UTC()
}
