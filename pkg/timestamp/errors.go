package timestamp

import (
	"errors"
	"fmt"
)

// Outcomes that a caller branches on (errors.Is). Each failure of Parse and
// Verify is one of the first five; the others say more about ErrBadToken.
var (
	// ErrMalformed: no TimeStampResp in the one form that is read.
	ErrMalformed = errors.New("malformed timestamp")
	// ErrNotGranted: an authority's refusal, which holds no token. The error is
	// a *StatusError.
	ErrNotGranted = errors.New("timestamp not granted")
	// ErrBadToken: a token that does not hold what it says.
	ErrBadToken = errors.New("bad timestamp")
	// ErrUnknownAuthority: none of the given authorities made the token.
	ErrUnknownAuthority = errors.New("unknown timestamp authority")
	// ErrAuthority: the caller's own trust in an authority is incomplete.
	ErrAuthority = errors.New("unusable timestamp authority")

	// ErrWeak: a hash or a key that can be forged today.
	ErrWeak = errors.New("too weak")
	// ErrWrongImprint: the token is for other bytes.
	ErrWrongImprint = errors.New("it is for another signature")
	// ErrSignature: the authority did not sign this.
	ErrSignature = errors.New("its signature does not hold")
	// ErrSigner: a certificate that may not sign timestamps.
	ErrSigner = errors.New("its certificate may not sign timestamps")
	// ErrOutsideWindow: made when the authority was not trusted.
	ErrOutsideWindow = errors.New("made outside the authority's window")
	// ErrImprecise: its accuracy is worse than MaxAccuracy.
	ErrImprecise = errors.New("too imprecise")
	// ErrVersion: a request of another version than 1.
	ErrVersion = errors.New("unknown version of a timestamp request")
	// ErrNonce: the answer to another request.
	ErrNonce = errors.New("it answers another request")
)

// StatusError is an authority's refusal.
type StatusError struct {
	Status int    // PKIStatus of RFC 3161, 2.4.2
	Text   string // the authority's words, shortened, untrusted
	Info   []int  // bits set in PKIFailureInfo
}

// Error says what the authority answered.
func (e *StatusError) Error() string {
	return fmt.Sprintf("%v: status %d, failure bits %v, %q", ErrNotGranted, e.Status, e.Info, e.Text)
}

// Is makes it an ErrNotGranted.
func (e *StatusError) Is(target error) bool { return target == ErrNotGranted }

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrMalformed, fmt.Errorf(format, args...))
}

// bad wraps both ErrBadToken and what it is about.
func bad(reason error, format string, args ...any) error {
	return fmt.Errorf("%w: %w: %s", ErrBadToken, reason, fmt.Sprintf(format, args...))
}
