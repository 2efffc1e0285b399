package suite

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Probe is what a process saw that called every method once: the code of each
// answer, and how many SVIDs or bundles were in it.
type Probe map[string]Seen

// Seen is one method's answer.
type Seen struct {
	Code    string `json:"code"`
	Entries int    `json:"entries"`
}

// Ask calls the methods whose answer depends on who asks.
func Ask(ctx context.Context, socket, audience string) (Probe, error) {
	conn, err := dial(socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r := newRun(ctx, Options{Socket: socket, Audience: audience}, conn)
	p := Probe{}
	x, err := r.x509SVIDs()
	p["FetchX509SVID"] = Seen{status.Code(err).String(), len(x.GetSvids())}
	xb, err := r.x509Bundles()
	p["FetchX509Bundles"] = Seen{status.Code(err).String(), len(xb.GetBundles())}
	j, err := r.jwtSVIDs()
	p["FetchJWTSVID"] = Seen{status.Code(err).String(), len(j.GetSvids())}
	jb, err := r.jwtBundles()
	p["FetchJWTBundles"] = Seen{status.Code(err).String(), len(jb.GetBundles())}
	return p, nil
}

func strangerClauses() []Clause {
	var out []Clause
	for _, m := range []struct{ section, rpc, profile string }{
		{"5.2.1", "FetchX509SVID", "x509"}, {"5.2.2", "FetchX509Bundles", "x509"}, {"6.2.1", "FetchJWTSVID", "jwt"}, {"6.2.2", "FetchJWTBundles", "jwt"},
	} {
		ask := func(r *run) (Seen, error) {
			if r.disabled(m.profile) {
				return Seen{}, notRun("the operator has disabled the profile")
			}
			p, err := r.stranger()
			return p[m.rpc], err
		}
		out = append(out, Clause{"workload-api/" + m.section + "/no-identity-no-empty-answer", Must, m.rpc + " answers a caller without identity with no empty message", func(_ context.Context, r *run) error {
			s, err := ask(r)
			if err != nil {
				return err
			}
			if s.Code == codes.OK.String() && s.Entries == 0 {
				return errors.New("a message with nothing in it")
			}
			if s.Code == "" {
				return errors.New("the process without identity did not call it")
			}
			return nil
		}}, Clause{"workload-api/" + m.section + "/no-identity-is-permission-denied", Should, m.rpc + " answers a caller without identity with PermissionDenied", func(_ context.Context, r *run) error {
			s, err := ask(r)
			if err != nil {
				return err
			}
			if s.Code != codes.PermissionDenied.String() {
				return fmt.Errorf("%s, %d entries", s.Code, s.Entries)
			}
			return nil
		}})
	}
	return out
}

// watched is what streams that were open before a scene's command showed since.
type watched struct {
	before  *workload.X509SVIDResponse
	x509    []*workload.X509SVIDResponse
	bundles []*workload.X509BundlesResponse
	jwt     []*workload.JWTBundlesResponse
	ended   error // what FetchX509SVID ended with
}

// event is one stream's message, or its end.
type event struct {
	x509    *workload.X509SVIDResponse
	bundles *workload.X509BundlesResponse
	jwt     *workload.JWTBundlesResponse
	stream  string
	err     error
}

func (w *watched) take(e event) {
	switch {
	case e.err != nil && e.stream == "FetchX509SVID":
		w.ended = e.err
	case e.x509 != nil:
		w.x509 = append(w.x509, e.x509)
	case e.bundles != nil:
		w.bundles = append(w.bundles, e.bundles)
	case e.jwt != nil:
		w.jwt = append(w.jwt, e.jwt)
	}
}

// watch opens the streams, lets the scene happen and gathers what comes until
// done has held for as long as settle, or Wait is over.
func (r *run) watch(ctx context.Context, scene func(context.Context) error, done func(*watched) bool, settle time.Duration) (*watched, error) {
	ctx, cancel := context.WithCancel(withHeader(ctx, "true"))
	defer cancel()
	events := make(chan event)
	open, err := r.openAll(ctx, events)
	if err != nil {
		return nil, err
	}
	w := &watched{}
	first := time.After(callTimeout)
	for range open {
		select {
		case e := <-events:
			if e.err != nil {
				return nil, notRun(e.stream + " ended before the scene began: " + short(e.err))
			}
			if e.x509 != nil {
				w.before = e.x509
			}
		case <-first:
			return nil, notRun("see workload-api/4.3/first-message-at-once")
		}
	}
	// The command takes its time; its effects may come meanwhile.
	finished := make(chan error, 1)
	go func() { finished <- scene(ctx) }()
	var deadline, settled <-chan time.Time
	for finished != nil || deadline != nil {
		select {
		case err := <-finished:
			if err != nil {
				return nil, notRun("the scene's command failed: " + err.Error())
			}
			finished, deadline = nil, time.After(r.Wait)
		case e := <-events:
			w.take(e)
		case <-deadline:
			return w, nil
		case <-settled:
			return w, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if finished == nil && settled == nil && done(w) {
			settled = time.After(settle)
		}
	}
	return w, nil
}

// openAll opens the streams of the enabled profiles; their messages come until
// the context ends.
func (r *run) openAll(ctx context.Context, events chan<- event) (int, error) {
	send := func(e event) bool {
		select {
		case events <- e:
			return e.err == nil
		case <-ctx.Done():
			return false
		}
	}
	open := 0
	if !r.disabled("x509") {
		svids, err := r.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		bundles, err2 := r.api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		if err := errors.Join(err, err2); err != nil {
			return 0, err
		}
		go drain(svids, func(m *workload.X509SVIDResponse, err error) bool {
			return send(event{stream: "FetchX509SVID", x509: m, err: err})
		})
		go drain(bundles, func(m *workload.X509BundlesResponse, err error) bool {
			return send(event{stream: "FetchX509Bundles", bundles: m, err: err})
		})
		open += 2
	}
	if !r.disabled("jwt") {
		bundles, err := r.api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		if err != nil {
			return 0, err
		}
		go drain(bundles, func(m *workload.JWTBundlesResponse, err error) bool {
			return send(event{stream: "FetchJWTBundles", jwt: m, err: err})
		})
		open++
	}
	return open, nil
}

func drain[M any](s grpc.ServerStreamingClient[M], each func(*M, error) bool) {
	for {
		m, err := s.Recv()
		if err != nil {
			m = nil
		}
		if !each(m, err) {
			return
		}
	}
}

// settle is how long the other streams have once one of them has moved: an event
// need not change what all of them carry.
const settle = 2 * time.Second

func (r *run) watchRotation(ctx context.Context) (*watched, error) {
	if r.TriggerRotation == nil {
		return nil, needs("--trigger-rotation")
	}
	return r.watch(ctx, r.TriggerRotation, func(w *watched) bool {
		return len(w.x509)+len(w.bundles)+len(w.jwt) > 0
	}, settle)
}

func (r *run) watchWithdrawal(ctx context.Context) (*watched, error) {
	if r.Withdraw == nil {
		return nil, needs("--withdraw")
	}
	if r.disabled("x509") {
		return nil, notRun("needs the X.509-SVID profile, whose messages show identities")
	}
	return r.watch(ctx, r.Withdraw, func(w *watched) bool { return w.ended != nil || len(w.missing()) > 0 }, 0)
}

func idsOf(m *workload.X509SVIDResponse) []string {
	var ids []string
	for _, s := range m.GetSvids() {
		ids = append(ids, s.GetSpiffeId())
	}
	slices.Sort(ids)
	return ids
}

// missing are the IDs that the last message has no more.
func (w *watched) missing() []string {
	if len(w.x509) == 0 {
		return nil
	}
	now := idsOf(w.x509[len(w.x509)-1])
	return slices.DeleteFunc(idsOf(w.before), func(id string) bool { return slices.Contains(now, id) })
}

func changeClauses() []Clause {
	return []Clause{
		{"workload-api/4.3/later-messages-are-whole", Must, "each later message of a stream is the full set, too", checkWhole},
		{"workload-api/4.3/rotation-arrives", Should, "what changes an answer sends a new one", func(_ context.Context, r *run) error {
			w, err := r.rotated()
			if err != nil {
				return err
			}
			if len(w.x509)+len(w.bundles)+len(w.jwt) == 0 {
				return fmt.Errorf("nothing came in %v", r.Wait)
			}
			return nil
		}},
		{"workload-api/4.3/withdrawn-is-absent", Must, "an identity that was withdrawn is in no later message", func(_ context.Context, r *run) error {
			w, err := r.withdrawn()
			if err != nil {
				return err
			}
			if w.ended == nil && len(w.missing()) == 0 {
				return fmt.Errorf("%d messages in %v, each with all of %q", len(w.x509), r.Wait, idsOf(w.before))
			}
			return nil
		}},
		{"workload-api/5.2.1/last-withdrawn-is-permission-denied", Should, "a caller who loses all identities is told PermissionDenied", func(_ context.Context, r *run) error {
			w, err := r.withdrawn()
			if err != nil {
				return err
			}
			if w.ended == nil {
				return notRun("needs --withdraw to take every identity")
			}
			if status.Code(w.ended) != codes.PermissionDenied {
				return errors.New(short(w.ended))
			}
			return nil
		}},
	}
}

// checkWhole compares with each stream's first message: a rotation changes what
// an SVID is, not which ones there are.
func checkWhole(_ context.Context, r *run) error {
	w, err := r.rotated()
	if err != nil {
		return err
	}
	if len(w.x509)+len(w.bundles)+len(w.jwt) == 0 {
		return notRun("no later message came, see workload-api/4.3/rotation-arrives")
	}
	var bad problems
	for i, m := range w.x509 {
		if !slices.Equal(idsOf(m), idsOf(w.before)) {
			bad.add("X509SVIDResponse %d has %q, not %q", i+1, idsOf(m), idsOf(w.before))
		} else if err := x509Fields(m); err != nil {
			bad.add("X509SVIDResponse %d: %v", i+1, err)
		}
		if !sameKeys(m.GetFederatedBundles(), w.before.GetFederatedBundles()) {
			bad.add("X509SVIDResponse %d has %d federated bundles, not %d", i+1, len(m.GetFederatedBundles()), len(w.before.GetFederatedBundles()))
		}
	}
	xb, _ := r.x509Bundles()
	for i, m := range w.bundles {
		if !sameKeys(m.GetBundles(), xb.GetBundles()) {
			bad.add("X509BundlesResponse %d has %d bundles, not %d", i+1, len(m.GetBundles()), len(xb.GetBundles()))
		}
	}
	jb, _ := r.jwtBundles()
	for i, m := range w.jwt {
		if !sameKeys(m.GetBundles(), jb.GetBundles()) {
			bad.add("JWTBundlesResponse %d has %d bundles, not %d", i+1, len(m.GetBundles()), len(jb.GetBundles()))
		}
	}
	return bad.err()
}

func sameKeys(a, b map[string][]byte) bool {
	return slices.Equal(slices.Sorted(maps.Keys(a)), slices.Sorted(maps.Keys(b)))
}
