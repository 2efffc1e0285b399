// Package svid is the certificate core: X.509 authorities and their rotation,
// the profiles of the SVIDs that they sign, and the two steps by which one is
// signed. Prepare validates everything and returns a token; Issue redeems it,
// once. Nothing else in this program signs an X.509-SVID.
//
// JWT authorities rotate the same way beside them. JWTSigner.Sign validates and
// signs in one step: a JWT-SVID carries no evidence that could be swapped between
// two. ParseJWT reads what others signed.
//
// The package is pure: the time is an argument, keys are given to it.
package svid

import "errors"

// Outcomes that callers branch on.
var (
	// ErrRequest means that the request itself can never be granted.
	ErrRequest = errors.New("svid: refused")
	// ErrEvidence means that evidence is missing, or does not fit the request.
	ErrEvidence = errors.New("svid: evidence does not fit")
	// ErrAuthority means that the authority cannot sign now: not valid yet, no
	// longer, or without its key.
	ErrAuthority = errors.New("svid: authority cannot sign")
	// ErrTokenUsed means that a token was redeemed before, or by another signer.
	ErrTokenUsed = errors.New("svid: token is used or not ours")
)
