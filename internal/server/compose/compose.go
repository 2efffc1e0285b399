// Package compose has CredentialComposer plugins add to SVIDs, and holds what
// they answer to what may be added.
//
// SPIRE takes over whatever a composer returns. Here one can only add: DNS names,
// a subject, extensions that decide nothing (pkg/svid: Composed), and claims that
// have no registered meaning. The SPIFFE ID, the key, the validity, the usages and
// the evidence of an SVID are the server's. Any other answer, and none, is an
// error: an SVID without what its composer adds is not the one that the operator
// configured.
package compose

import (
	"context"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/rootlink/rootlink/pkg/svid"
)

// timeout is how long one composer may think about one SVID.
const timeout = 10 * time.Second

// MaxAdded is about the most that all composers together can add to an X509-SVID,
// in bytes: DNS names, and the rest.
const MaxAdded = 2 * svid.MaxComposed

// Composer is one plugin.
type Composer struct {
	Name   string
	Client composerv1.CredentialComposerClient
}

// Chain are the composers in the order in which they are asked; each sees what
// the ones before it added.
type Chain []Composer

// Error is an SVID that is not issued on account of a composer.
type Error struct {
	Composer string
	// Refused: it answered with what may not be added. Otherwise it did not answer.
	Refused bool
	Err     error
}

func (e *Error) Error() string {
	if e.Refused {
		return fmt.Sprintf("credential composer %q: %v", e.Composer, e.Err)
	}
	return fmt.Sprintf("credential composer %q failed: %v", e.Composer, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// answer is the part of the three X.509 responses that counts.
type answer interface {
	GetAttributes() *composerv1.X509SVIDAttributes
}

// X509 completes a request for an X509-SVID. One with evidence about its key, or
// that will sign a statement, is left alone.
func (c Chain) X509(ctx context.Context, r *svid.Request) error {
	if r.Profile == svid.Issuer || r.Evidence != nil {
		return nil
	}
	own := r.DNSNames
	for _, one := range c {
		if err := one.x509(ctx, r, own); err != nil {
			return err
		}
	}
	return nil
}

func (c Composer) x509(ctx context.Context, r *svid.Request, own []string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	attrs := attributesOf(r)
	var got answer
	var err error
	switch r.Profile {
	case svid.Server:
		got, err = c.Client.ComposeServerX509SVID(ctx, &composerv1.ComposeServerX509SVIDRequest{Attributes: attrs})
	case svid.Agent:
		got, err = c.Client.ComposeAgentX509SVID(ctx, &composerv1.ComposeAgentX509SVIDRequest{
			Attributes: attrs, SpiffeId: r.ID.String(), PublicKey: r.SPKI,
		})
	default: // as SPIRE: what an administrator mints is a workload's
		got, err = c.Client.ComposeWorkloadX509SVID(ctx, &composerv1.ComposeWorkloadX509SVIDRequest{
			Attributes: attrs, SpiffeId: r.ID.String(), PublicKey: r.SPKI,
		})
	}
	switch {
	case status.Code(err) == codes.Unimplemented:
		return nil // the interface's word for "as it is"
	case err != nil:
		return &Error{Composer: c.Name, Err: err}
	case got.GetAttributes() == nil:
		return nil
	}
	if err := apply(r, own, got.GetAttributes()); err != nil {
		return &Error{Composer: c.Name, Refused: true, Err: err}
	}
	return nil
}

func attributesOf(r *svid.Request) *composerv1.X509SVIDAttributes {
	subject := r.Subject()
	out := &composerv1.X509SVIDAttributes{DnsSans: slices.Clone(r.DNSNames)}
	if r.Composed != nil {
		subject = r.Composed.Subject
		for _, e := range r.Composed.Extensions {
			out.ExtraExtensions = append(out.ExtraExtensions, &composerv1.X509Extension{Oid: e.Id.String(), Value: e.Value})
		}
	}
	out.Subject = fromName(subject)
	return out
}

var (
	errDropped = errors.New("it took away DNS names of the entry")
	errClaims  = errors.New("it changed claims that are not its own")
)

// apply changes r to what a composer answered, or not at all. own are the DNS names
// of the entry.
func apply(r *svid.Request, own []string, a *composerv1.X509SVIDAttributes) error {
	for _, n := range r.DNSNames {
		if !slices.Contains(a.DnsSans, n) {
			return fmt.Errorf("%w: %s", errDropped, n)
		}
	}
	if len(a.DnsSans) > svid.MaxDNSNames {
		return fmt.Errorf("%d DNS names, at most %d allowed", len(a.DnsSans), svid.MaxDNSNames)
	}
	added := 0
	for _, n := range a.DnsSans {
		if err := svid.CheckDNSName(n); err != nil {
			return err
		}
		if !slices.Contains(own, n) {
			added += len(n) + 8
		}
	}
	if added > svid.MaxComposed {
		return fmt.Errorf("%d bytes of DNS names added, at most %d allowed", added, svid.MaxComposed)
	}
	if n := len(a.ExtraExtensions); n > svid.MaxComposedExtensions {
		return fmt.Errorf("%d extensions, at most %d allowed", n, svid.MaxComposedExtensions)
	}
	out := new(svid.Composed)
	var err error
	if out.Subject, err = toName(a.Subject); err != nil {
		return fmt.Errorf("subject: %w", err)
	}
	for _, e := range a.ExtraExtensions {
		id, err := parseOID(e.GetOid())
		if err != nil {
			return fmt.Errorf("extension: %w", err)
		}
		out.Extensions = append(out.Extensions, pkix.Extension{Id: id, Value: e.GetValue(), Critical: e.GetCritical()})
	}
	if err := out.Check(); err != nil {
		return err
	}
	r.DNSNames, r.Composed = a.DnsSans, out
	return nil
}

// JWT completes a request for a JWT-SVID that will begin and end at these times.
func (c Chain) JWT(ctx context.Context, r *svid.JWTRequest, begin, end time.Time) error {
	for _, one := range c {
		if err := one.jwt(ctx, r, begin, end); err != nil {
			return err
		}
	}
	return nil
}

func (c Composer) jwt(ctx context.Context, r *svid.JWTRequest, begin, end time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	all := map[string]any{"sub": r.ID.String(), "aud": r.Audience, "iat": begin.Unix(), "exp": end.Unix()}
	for k, v := range r.Extra {
		all[k] = v
	}
	// Through JSON, so that what comes back compares with what was sent.
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	sent := new(structpb.Struct)
	if err := sent.UnmarshalJSON(b); err != nil {
		return err
	}
	got, err := c.Client.ComposeWorkloadJWTSVID(ctx, &composerv1.ComposeWorkloadJWTSVIDRequest{
		SpiffeId: r.ID.String(), Attributes: &composerv1.JWTSVIDAttributes{Claims: sent},
	})
	switch {
	case status.Code(err) == codes.Unimplemented:
		return nil
	case err != nil:
		return &Error{Composer: c.Name, Err: err}
	case got.GetAttributes() == nil:
		return nil
	}
	claims, before := got.Attributes.GetClaims().AsMap(), sent.AsMap()
	for _, name := range []string{"sub", "aud", "iat", "exp"} {
		if !reflect.DeepEqual(claims[name], before[name]) {
			return &Error{Composer: c.Name, Refused: true, Err: fmt.Errorf("%w: %s", errClaims, name)}
		}
		delete(claims, name)
	}
	if err := svid.CheckClaims(claims); err != nil {
		return &Error{Composer: c.Name, Refused: true, Err: err}
	}
	r.Extra = claims
	return nil
}
