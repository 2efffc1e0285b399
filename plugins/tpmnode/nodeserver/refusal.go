package nodeserver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/attestca"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

// refusal ends an attestation. The caller, who has proved nothing yet, learns
// the short text only; the log has the reason.
type refusal struct {
	code   codes.Code
	reason string // stable, for logs and counters
	public string
	err    error // for the log, may be nil
}

func (r *refusal) Error() string {
	if r.err == nil {
		return r.public
	}
	return r.public + ": " + r.err.Error()
}

func (r *refusal) Unwrap() error { return r.err }

// GRPCStatus is what gRPC sends.
func (r *refusal) GRPCStatus() *status.Status { return status.New(r.code, r.public) }

// A final verdict: PermissionDenied makes an agent that starts give up, so it
// is only for what no retry changes.
func denied(reason, public string, err error) error {
	return &refusal{codes.PermissionDenied, reason, public, err}
}

// The agent broke the protocol, or something on its way did.
func invalid(reason, public string, err error) error {
	return &refusal{codes.InvalidArgument, reason, public, err}
}

// Our side cannot say now. The agent tries again.
func unavailable(reason, public string, err error) error {
	return &refusal{codes.Unavailable, reason, public, err}
}

// ekRefusal maps the reasons of attest.VerifyEK.
func ekRefusal(err error) error {
	switch {
	case errors.Is(err, attest.ErrEKDenied):
		return denied("ek_denied", "this TPM is not accepted", err)
	case errors.Is(err, attest.ErrEKMismatch):
		return denied("ek_mismatch", "EK certificate and key do not belong together", err)
	case errors.Is(err, attest.ErrEKWeak):
		return denied("ek_weak", "EK is too weak", err)
	}
	return denied("ek_untrusted", "EK is not trusted here", err)
}

// akRefusal maps the reasons of attest.VerifyAK.
func akRefusal(err error) error {
	return denied("ak_unacceptable", "AK is not acceptable", err)
}

// quoteRefusal maps the reasons of attest.VerifyQuote. A quote over something
// else may come from a mix-up on the agent's side, and a new one is cheap.
func quoteRefusal(err error) error {
	if errors.Is(err, attest.ErrQuoteExtraData) {
		return invalid("quote_binding", "quote is not bound to this attestation", err)
	}
	return denied("quote", "quote is not acceptable", err)
}

// messageRefusal maps the reasons of package wire.
func messageRefusal(err error) error {
	switch {
	case errors.Is(err, wire.ErrVersion):
		return denied("version", "protocol version is not supported", err)
	case errors.Is(err, wire.ErrTooLarge):
		return invalid("too_large", "message is too large", err)
	}
	return invalid("malformed", "message is malformed", err)
}

func caRefusal(err error) error {
	if errors.Is(err, attestca.ErrExpired) {
		return unavailable("ca_expired", "server cannot certify AKs now", err)
	}
	return unavailable("ca", "server cannot certify AKs now", err)
}

// errRound means that one side took too long for one message.
var errRound = errors.New("no answer in time")

// round runs f, which blocks on the stream, for at most d. SPIRE holds a lock
// over a re-attestation and sets no deadline of its own: a stalled agent would
// keep its slot for ever. When time is up f is left behind; it ends as soon as
// the handler returns, because that ends the stream.
func round[T any](ctx context.Context, d time.Duration, what string, f func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	t := time.NewTimer(d)
	defer t.Stop()
	var zero T
	select {
	case r := <-done:
		return r.v, r.err
	case <-t.C:
		return zero, &refusal{codes.DeadlineExceeded, "deadline", "no answer in time", fmt.Errorf("%s: %w after %v", what, errRound, d)}
	case <-ctx.Done():
		if r := new(refusal); errors.As(context.Cause(ctx), &r) {
			return zero, r
		}
		return zero, &refusal{status.FromContextError(ctx.Err()).Code(), "cancelled", "attestation ended early", fmt.Errorf("%s: %w", what, context.Cause(ctx))}
	}
}
