// Package suite holds one check for each MUST of SPIFFE's documents that can be
// seen from a Workload API socket. It knows no implementation: what it asks for
// it asks with the published protocol, and what it judges are the answers.
package suite

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
)

// Level says what a clause that does not hold amounts to.
type Level string

const (
	Must   Level = "must"   // not conforming
	Should Level = "should" // advice, never a failure
)

// Outcome is what became of one clause.
type Outcome string

const (
	Pass   Outcome = "pass"
	Fail   Outcome = "fail"
	Advice Outcome = "advice"
	NotRun Outcome = "not run"
)

// Clause is one requirement. ID is document/section/name and stays as it is:
// files of known deviations name it.
type Clause struct {
	ID    string
	Level Level
	Says  string

	check func(context.Context, *run) error
}

// Result is a clause with its outcome, and why when that is not Pass.
type Result struct {
	Clause
	Outcome Outcome
	Why     string
}

// Options is the endpoint and the scenes: what a test needs beyond a caller that
// has an identity. Without its scene a clause is not run.
type Options struct {
	Socket   string // SPIFFE_ENDPOINT_SOCKET's form
	Audience string

	// Disabled profiles, "x509" or "jwt": the operator has turned them off.
	Disabled []string
	// Federated is the SPIFFE ID of a trust domain that the caller federates with.
	Federated string
	// Bundles are SPIFFE bundle documents of the trust domain, oldest first.
	Bundles [][]byte
	// JWTKey signs JWT-SVIDs in the trust domain under test. What only an issuer
	// could sign wrongly is then really signed.
	JWTKey crypto.Signer
	// WithoutIdentity starts Probe as a process that has no identity.
	WithoutIdentity func(context.Context) (Probe, error)
	// TriggerRotation has the caller's SVIDs or bundles replaced, and changes
	// nothing about which ones it gets.
	TriggerRotation func(context.Context) error
	// Withdraw takes one or all of the caller's identities away.
	Withdraw func(context.Context) error

	// Prompt is how soon "without delay" is, Wait how long a scene's effect may
	// take to arrive.
	Prompt, Wait time.Duration
}

// ErrUnreachable: there is no endpoint to judge.
var ErrUnreachable = errors.New("the endpoint does not answer")

// notRun is a check's answer when there is nothing to see.
type notRun string

func (n notRun) Error() string { return string(n) }

func needs(flag string) error { return notRun("needs " + flag) }

// Clauses are all of them, in the order they are run: those that disturb the
// caller's identity come last.
func Clauses() []Clause {
	return slices.Concat(endpointClauses(), profileClauses(), x509APIClauses(), jwtAPIClauses(), validateClauses(),
		x509SVIDClauses(), jwtSVIDClauses(), spiffeIDClauses(), bundleClauses(), strangerClauses(), changeClauses())
}

// Run judges the clauses whose ID matches; nil matches all.
func Run(ctx context.Context, o Options, match *regexp.Regexp) ([]Result, error) {
	conn, err := dial(o.Socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r := newRun(ctx, o, conn)
	if r.dead, err = r.answers(ctx); err != nil {
		return nil, err
	}
	var results []Result
	for _, c := range Clauses() {
		if match != nil && !match.MatchString(c.ID) {
			continue
		}
		results = append(results, r.judge(ctx, c))
		if err := ctx.Err(); err != nil {
			return results, err
		}
	}
	return results, nil
}

func (r *run) judge(ctx context.Context, c Clause) Result {
	res := Result{Clause: c, Outcome: Pass}
	err := error(notRun("see workload-endpoint/3/served-over-grpc"))
	if r.dead == nil || strings.HasPrefix(c.ID, "workload-endpoint/3") {
		err = c.check(ctx, r)
	}
	var skipped notRun
	switch {
	case err == nil:
	case errors.As(err, &skipped):
		res.Outcome, res.Why = NotRun, skipped.Error()
	case c.Level == Should:
		res.Outcome, res.Why = Advice, err.Error()
	default:
		res.Outcome, res.Why = Fail, err.Error()
	}
	return res
}

// run is one run against one endpoint. What it has fetched it keeps: the clauses
// about an answer are about the same answer.
type run struct {
	Options
	conn *grpc.ClientConn
	api  workload.SpiffeWorkloadAPIClient
	dead error // something listens, and no gRPC without TLS comes of it

	x509SVIDs   func() (*workload.X509SVIDResponse, error)
	x509Bundles func() (*workload.X509BundlesResponse, error)
	jwtSVIDs    func() (*workload.JWTSVIDResponse, error)
	jwtBundles  func() (*workload.JWTBundlesResponse, error)
	stranger    func() (Probe, error)
	rotated     func() (*watched, error)
	withdrawn   func() (*watched, error)
}

func newRun(ctx context.Context, o Options, conn *grpc.ClientConn) *run {
	r := &run{Options: o, conn: conn, api: workload.NewSpiffeWorkloadAPIClient(conn)}
	r.x509SVIDs = sync.OnceValues(func() (*workload.X509SVIDResponse, error) {
		return first(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
			return r.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		})
	})
	r.x509Bundles = sync.OnceValues(func() (*workload.X509BundlesResponse, error) {
		return first(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509BundlesResponse], error) {
			return r.api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		})
	})
	r.jwtSVIDs = sync.OnceValues(func() (*workload.JWTSVIDResponse, error) {
		ctx, cancel := call(ctx)
		defer cancel()
		return r.api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: r.audiences()})
	})
	r.jwtBundles = sync.OnceValues(func() (*workload.JWTBundlesResponse, error) {
		return first(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.JWTBundlesResponse], error) {
			return r.api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		})
	})
	r.stranger = sync.OnceValues(func() (Probe, error) {
		if r.WithoutIdentity == nil {
			return nil, needs("--without-identity")
		}
		return r.WithoutIdentity(ctx)
	})
	r.rotated = sync.OnceValues(func() (*watched, error) { return r.watchRotation(ctx) })
	r.withdrawn = sync.OnceValues(func() (*watched, error) { return r.watchWithdrawal(ctx) })
	return r
}

// audiences are two, so that a server that embeds the first alone is seen.
func (r *run) audiences() []string { return []string{r.Audience, r.Audience + "-second"} }

func (r *run) disabled(profile string) bool { return slices.Contains(r.Disabled, profile) }

// problems gathers what one clause finds, so that all of it is told at once.
type problems []string

func (p *problems) add(format string, args ...any) { *p = append(*p, fmt.Sprintf(format, args...)) }

func (p problems) err() error {
	const shown = 5
	switch {
	case len(p) == 0:
		return nil
	case len(p) > shown:
		return fmt.Errorf("%s; and %d more", strings.Join(p[:shown], "; "), len(p)-shown)
	}
	return errors.New(strings.Join(p, "; "))
}
