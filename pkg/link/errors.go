package link

import (
	"errors"
	"fmt"

	"github.com/rootlink/rootlink/pkg/strictjson"
)

// Outcomes that a caller branches on. Every failure of this package is one of
// them (errors.Is).
var (
	// ErrMalformed: input that is not what it claims to be in form.
	ErrMalformed = strictjson.ErrMalformed
	// ErrCrypto: a signature, chain, binding or time check failed.
	ErrCrypto = errors.New("cryptographic check failed")
	// ErrPolicy: everything is genuine and yet not what was asked for.
	ErrPolicy = errors.New("policy not met")
	// ErrUnsupported: a kind that this version knows by name and cannot judge.
	ErrUnsupported = errors.New("not supported yet")
	// ErrRolledBack: a trust.json with a lower serial than one already seen.
	ErrRolledBack = errors.New("rolled back")
	// ErrExpired: the SVID was no longer valid at T.
	ErrExpired = errors.New("expired")
	// ErrNoTime: too few known authorities attest when a link was signed.
	ErrNoTime = errors.New("not enough attested time")
	// ErrNotLogged: no known log is shown to hold what must be in one.
	ErrNotLogged = errors.New("no proof that a known log holds it")
	// ErrUnsigned: a trust.json or revocation file that nobody signed.
	ErrUnsigned = errors.New("not signed")
	// ErrEquivocated: two trust.json files that cannot both be in one history.
	ErrEquivocated = errors.New("another history")
	// ErrForeignTrust: a trust.json by another key than the one that is pinned
	// or was seen before.
	ErrForeignTrust = errors.New("signed by another key")
	// ErrNotYetValid: the SVID or trust.json begins later, by the verifier's
	// clock.
	ErrNotYetValid = errors.New("not valid yet")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrMalformed, fmt.Errorf(format, args...))
}
