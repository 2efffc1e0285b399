package upstream

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/join"
)

var (
	// ErrWrongServer is final too: the agent has never attested with this data
	// directory, and the server cannot prove to be the one that its join line is
	// from. With a data directory that has attested it may be an attack or a
	// detour, which passes.
	ErrWrongServer = errors.New("the join line is of another server")
	// ErrBanned is final: an operator banned this node.
	ErrBanned = errors.New("this node is banned at the server")
	// ErrNotAttested means that there is no agent SVID yet.
	ErrNotAttested = errors.New("agent is not attested yet")
)

// WrongServerHint says what to do about ErrWrongServer.
const WrongServerHint = "the server at --server is not the one that the trust bundle or join line is from: correct the address, or copy the bundle or line again from the right server"

// BannedHint says what to do about ErrBanned.
const BannedHint = "an operator can lift the ban with `rootlink-server agent evict` (a stock server: `spire-server agent evict`) on this agent's ID; then start the agent again"

// BannedStatus is ErrBanned for a workload.
func BannedStatus() error {
	return status.Error(codes.PermissionDenied, cli.JoinHint(ErrBanned.Error(), BannedHint))
}

// refusedError is a call that failed because the server refused the agent
// itself. Its code is for whoever waits for the call: what a server says to an
// agent is not an answer to a workload.
type refusedError struct {
	code   codes.Code
	what   error // ErrBanned or ErrNotAttested
	theirs error
}

func (e *refusedError) Error() string {
	return fmt.Sprintf("%v: %s", e.what, status.Convert(e.theirs).Message())
}
func (e *refusedError) Unwrap() []error            { return []error{e.what, e.theirs} }
func (e *refusedError) GRPCStatus() *status.Status { return status.New(e.code, e.Error()) }

// ClockError means that the server's certificate (or signed answer) would be
// good at another time: one of the two clocks is wrong.
type ClockError struct {
	Ours   time.Time
	Theirs time.Time // a time at which the server's certificate is valid
}

func (e *ClockError) Error() string {
	d := e.Theirs.Sub(e.Ours).Round(time.Second)
	word := "behind"
	if d < 0 {
		word, d = "ahead of", -d
	}
	return fmt.Sprintf("this machine's clock says %s, at least %s %s the server's",
		e.Ours.UTC().Format(time.RFC3339), d, word)
}

// Hint says what to do about it.
func (e *ClockError) Hint() string {
	return "set the clock (timedatectl set-ntp true, or chronyc makestep) here or on the server"
}

// clockError explains err of verifying a server certificate chain by the
// clock, when the same chain verifies at a time inside its validity.
func clockError(leaf *x509.Certificate, now time.Time, verifyAt func(time.Time) error) *ClockError {
	var theirs time.Time
	switch {
	case now.Before(leaf.NotBefore):
		theirs = leaf.NotBefore
	case now.After(leaf.NotAfter):
		theirs = leaf.NotAfter
	default:
		return nil
	}
	// A certificate that is bad at any time is not a matter of clocks.
	if verifyAt(theirs) != nil {
		return nil
	}
	return &ClockError{Ours: now, Theirs: theirs}
}

// denial returns why the server refused the agent itself.
func denial(err error) (types.PermissionDeniedDetails_Reason, bool) {
	st, ok := status.FromError(err)
	if !ok || st.Code() != codes.PermissionDenied {
		return 0, false
	}
	for _, d := range st.Details() {
		if pd, ok := d.(*types.PermissionDeniedDetails); ok {
			return pd.GetReason(), true
		}
	}
	return 0, false
}

// stockBanned is what SPIRE's server says to a banned agent that attests: there,
// unlike on any later call, its answer has no details, and the code alone is that
// of every other refusal, which an agent tries again.
const stockBanned = "failed to attest: agent is banned"

// bannedAtAttestation says whether an attestation was refused because of a ban.
func bannedAtAttestation(err error) bool {
	if reason, ok := denial(err); ok {
		return reason == types.PermissionDeniedDetails_AGENT_BANNED
	}
	var e *callError
	return errors.As(err, &e) && status.Code(e.err) == codes.PermissionDenied && e.message == stockBanned
}

// callError is a failed call for somebody who reads a log: without the prefix
// of gRPC, and with what to do.
type callError struct {
	what, message, hint string
	err                 error
}

func (e *callError) Error() string { return e.what + ": " + e.message }
func (e *callError) Unwrap() error { return e.err }
func (e *callError) Hint() string  { return e.hint }

// pluginError is a failure of the node attestor, which puts its hint behind
// the message: text is all that the plugin interface carries.
func pluginError(err error) error {
	msg, hint := cli.CutHint(status.Convert(err).Message())
	return &callError{"node attestor", msg, hint, err}
}

// serverError is a failure of the server's side of an attestation.
func serverError(err error) error {
	st := status.Convert(err)
	e := &callError{what: "attest agent", message: st.Message(), err: err}
	switch st.Code() {
	case codes.PermissionDenied:
		e.hint = "the server's log has the reason in full; `rootlink-agent tpm info` prints this TPM's EK hash and maker, for the server's --ek-allow or --ek-roots"
	case codes.Unavailable:
		e.hint = "is the server running, and --server its address?"
	case codes.ResourceExhausted:
		e.hint = "many machines attest from this address: it is tried again; the server's --attest-rate allows more"
	}
	return e
}

// hint says what to do about a failed attestation, or "".
func hint(err error) string {
	if h, ok := errors.AsType[interface {
		error
		Hint() string
	}](err); ok {
		return h.Hint()
	}
	if errors.Is(err, join.ErrTrustKey) || isUnknownAuthority(err) {
		return WrongServerHint
	}
	return ""
}
