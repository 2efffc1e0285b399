package nodeagent

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// quoteTimeout bounds one shared quote. Callers have deadlines of their own.
const quoteTimeout = 60 * time.Second

// quoter commits to leaves, many with one quote. It quotes at once when idle and
// collects while a quote runs, so that a lone request waits for nobody and a
// thousand share what a hardware TPM can do five times a second.
type quoter struct {
	*node
	maxBatch int
	now      func() time.Time
	ctx      context.Context // ends with the plugin
	cancel   context.CancelFunc
	runner   sync.WaitGroup
	// encoding holds a token for each record that is being encoded. All leaves
	// of a quote are let go at once; in turns the oldest get on with theirs.
	encoding chan struct{}

	mu      sync.Mutex // guards all below
	waiting []*request // in order of arrival
	running bool
	cert    *certified // nil until known
	log     *eventLog  // nil until read
}

// certified is the identity that goes into every record.
type certified struct {
	akName   []byte
	chain    [][]byte // AK certificate first
	notAfter time.Time
	boot     *attest.BootCounters // that the certificate names, nil when it names none
	ek       *tpm.EK
}

// newCertified reads what the first certificate of chain, the AK's, says.
func newCertified(akName []byte, chain [][]byte) (*certified, error) {
	cert, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	st, err := attest.ParseAKCertificate(cert)
	if err != nil {
		return nil, err
	}
	return &certified{akName: akName, chain: chain, notAfter: cert.NotAfter, boot: st.Boot}, nil
}

type eventLog struct{ digest *attest.TypedDigest }

// request is one leaf on its way into a quote.
type request struct {
	ctx  context.Context
	leaf *attest.Leaf
	pcrs []attest.PCRSelection
	key  string // of pcrs: requests with one key share a quote
	done chan result
}

type result struct {
	c     *tpm.Commitment
	index uint64
	err   error
}

func newQuoter(n *node, maxBatch int, now func() time.Time) *quoter {
	if maxBatch <= 0 || maxBatch > attest.MaxLeaves {
		maxBatch = attest.MaxLeaves
	}
	q := &quoter{node: n, maxBatch: maxBatch, now: now, encoding: make(chan struct{}, runtime.GOMAXPROCS(0))}
	q.ctx, q.cancel = context.WithCancel(context.Background())
	return q
}

// close ends running and waiting requests.
func (q *quoter) close() {
	q.cancel()
	q.runner.Wait()
}

// certified is told the AK certificate when attestation brings it.
func (q *quoter) certified(ak *tpm.AK, chain [][]byte) {
	c, err := newCertified(ak.Name, chain)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.cert = nil; err == nil {
		q.cert = c
	}
}

// identity returns the certified AK and the EK, or a status that says what is
// missing.
func (q *quoter) identity(ctx context.Context) (*certified, error) {
	q.mu.Lock()
	c := q.cert
	q.mu.Unlock()
	if c == nil || c.ek == nil {
		ek, err := q.dev.EK(ctx)
		if err != nil {
			return nil, deviceStatus("read the EK", err)
		}
		if c == nil {
			if c, err = q.fromDisk(ctx); err != nil {
				return nil, err
			}
		}
		with := *c
		with.ek = ek
		c = &with
		q.mu.Lock()
		q.cert = c
		q.mu.Unlock()
	}
	if !q.now().Before(c.notAfter) {
		return nil, wire.MustAttest("the AK certificate has expired")
	}
	return c, nil
}

func (q *quoter) fromDisk(ctx context.Context) (*certified, error) {
	ak, err := q.dev.AK(ctx)
	if err != nil {
		return nil, deviceStatus("load the AK", err)
	}
	chain, err := q.dev.AKCertificate(ak)
	if errors.Is(err, tpm.ErrNoAKCertificate) {
		return nil, wire.MustAttest("no AK certificate yet")
	}
	if err != nil {
		return nil, deviceStatus("AK certificate", err)
	}
	c, err := newCertified(ak.Name, chain)
	if err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "AK certificate: %v", err)
	}
	return c, nil
}

// Quote commits to one leaf and returns the finished evidence record.
func (p *Plugin) Quote(ctx context.Context, req *tpmv1.QuoteRequest) (_ *tpmv1.QuoteResponse, err error) {
	defer p.recover("Quote", &err)
	n, err := p.configured()
	if err != nil {
		return nil, err
	}
	leaf, err := n.leaf(req.GetLeaf())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "leaf: %v", err)
	}
	pcrs := attest.DefaultPCRs()
	if len(req.GetPcrs()) > 0 {
		if pcrs, err = wire.SelectionsFromProto(req.GetPcrs()); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "PCRs to quote: %v", err)
		}
	}
	if err := refuseResettable(pcrs); err != nil {
		return nil, err
	}
	id, err := n.q.identity(ctx)
	if err != nil {
		return nil, err
	}
	res, err := n.q.wait(ctx, id, leaf, pcrs)
	if err != nil {
		return nil, err
	}
	n.q.encoding <- struct{}{}
	b, err := n.q.evidence(id, leaf, res).MarshalRecord()
	<-n.q.encoding
	if err != nil {
		return nil, status.Errorf(codes.Internal, "evidence: %v", err)
	}
	return &tpmv1.QuoteResponse{Evidence: b}, nil
}

// leaf reads the fields of a request and adds the salt. Unmeasured digests may
// be absent; what identifies key, agent and moment may not.
func (n *node) leaf(m *tpmv1.Leaf) (*attest.Leaf, error) {
	if m == nil {
		return nil, errors.New("missing")
	}
	l := &attest.Leaf{
		Kind: attest.Kind(min(m.GetKind(), 255)), KeyOrigin: attest.KeyOrigin(min(m.GetKeyOrigin(), 255)),
		TrustDomain: m.GetTrustDomain(), SPIFFEID: m.GetSpiffeId(), Selectors: m.GetSelectors(),
	}
	if l.TrustDomain != n.trustDomain {
		return nil, fmt.Errorf("trust domain %q is not this node's", l.TrustDomain)
	}
	for _, f := range []struct {
		name     string
		from     []byte
		to       *[32]byte
		optional bool
	}{
		{"svid_key_sha256", m.GetSvidKeySha256(), &l.SVIDKey, false},
		{"agent_key_sha256", m.GetAgentKeySha256(), &l.AgentKey, false},
		{"nonce", m.GetNonce(), &l.Nonce, false},
		{"executable", m.GetExecutable(), &l.Executable, true},
		{"recorder", m.GetRecorder(), &l.Recorder, true},
		{"tool", m.GetTool(), &l.Tool, true},
		{"payload", m.GetPayload(), &l.Payload, true},
	} {
		switch {
		case len(f.from) == 32:
			*f.to = [32]byte(f.from)
		case len(f.from) != 0 || !f.optional:
			return nil, fmt.Errorf("%s has %d bytes instead of 32", f.name, len(f.from))
		}
		if !f.optional && *f.to == [32]byte{} {
			return nil, fmt.Errorf("%s is zero", f.name)
		}
	}
	// Two equal requests make two leaves, and a server takes each only once.
	if _, err := rand.Read(l.Salt[:]); err != nil {
		return nil, err
	}
	// Hashed here so that one bad leaf fails alone and not its whole batch.
	if _, err := l.Hash(); err != nil {
		return nil, err
	}
	return l, nil
}

// wait waits for a quote that covers leaf.
func (q *quoter) wait(ctx context.Context, id *certified, leaf *attest.Leaf, pcrs []attest.PCRSelection) (res result, err error) {
	r := &request{ctx: ctx, leaf: leaf, pcrs: pcrs, key: attest.FormatPCRs(pcrs), done: make(chan result, 1)}
	q.mu.Lock()
	if q.ctx.Err() != nil {
		q.mu.Unlock()
		return res, status.Error(codes.Unavailable, "the plugin is closing")
	}
	q.waiting = append(q.waiting, r)
	if !q.running {
		q.running = true
		q.runner.Add(1)
		go q.run()
	}
	q.mu.Unlock()

	select {
	case res = <-r.done:
	case <-ctx.Done():
		return res, status.FromContextError(ctx.Err()).Err()
	}
	if res.err != nil {
		return res, deviceStatus("quote", res.err)
	}
	if string(res.c.AKName) != string(id.akName) {
		// The TPM was cleared meanwhile and has a new AK, which nobody certified.
		q.mu.Lock()
		q.cert = nil
		q.mu.Unlock()
		return res, status.Error(codes.FailedPrecondition, "the attestation key was replaced: the node must attest again first")
	}
	// No server looks at detached evidence: a verifier that finds the quote to be
	// of another boot than the certificate refuses it when it is too late. (Of
	// other evidence the server says so, which has the agent attest again.)
	if leaf.Kind == attest.KindDetached && (id.boot == nil || *id.boot != res.c.Boot) {
		return res, wire.MustAttest("the TPM was reset or restarted since its attestation key was certified")
	}
	return res, nil
}

// evidence assembles what a quote says of leaf.
func (q *quoter) evidence(id *certified, leaf *attest.Leaf, res result) *attest.Evidence {
	e := &attest.Evidence{
		Attest: res.c.Attest, Signature: res.c.Signature, PCRs: res.c.PCRs,
		AKCert: id.chain[0], EKChain: id.ek.Chain, EventLog: q.eventLogDigest(),
		Kind: leaf.Kind, KeyOrigin: leaf.KeyOrigin, AgentKey: leaf.AgentKey,
		Executable: leaf.Executable, Recorder: leaf.Recorder, Tool: leaf.Tool, Payload: leaf.Payload,
		Selectors: leaf.Selectors, Nonce: leaf.Nonce, Salt: leaf.Salt,
		Index: res.index, Size: res.c.Tree.Size(), Path: res.c.Tree.Path(res.index),
	}
	if len(e.EKChain) == 0 {
		e.EKPublic = id.ek.SPKI
	}
	return e
}

// eventLogDigest names the boot event log, which does not change until reboot.
func (q *quoter) eventLogDigest() *attest.TypedDigest {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.log == nil {
		q.log = &eventLog{}
		// A log that cannot be read is left out, as on a host without one: a
		// verifier that wants the log fails for lack of it.
		if b, err := tpm.ReadEventLog(q.eventLogPath); err == nil && b != nil {
			sum := sha256.Sum256(b)
			q.log.digest = &attest.TypedDigest{Alg: "sha256", Value: sum[:]}
		}
	}
	return q.log.digest
}

// run quotes until nobody waits.
func (q *quoter) run() {
	defer q.runner.Done()
	for {
		batch := q.take()
		if batch == nil {
			return
		}
		leaves := make([]*attest.Leaf, len(batch))
		for i, r := range batch {
			leaves[i] = r.leaf
		}
		ctx, cancel := context.WithTimeout(q.ctx, quoteTimeout)
		c, err := q.dev.QuoteLeaves(ctx, batch[0].pcrs, leaves)
		cancel()
		for i, r := range batch {
			r.done <- result{c, uint64(i), err}
		}
	}
}

// take removes the oldest request and all that can share its quote. It returns
// nil, and the runner ends, when nobody waits.
func (q *quoter) take() []*request {
	q.mu.Lock()
	defer q.mu.Unlock()
	var batch, rest []*request
	for _, r := range q.waiting {
		switch {
		case r.ctx.Err() != nil:
			// The caller has gone; do not spend a leaf on it.
		case len(batch) == 0, r.key == batch[0].key && len(batch) < q.maxBatch:
			batch = append(batch, r)
		default:
			rest = append(rest, r)
		}
	}
	q.waiting = rest
	if len(batch) == 0 {
		q.running = false
	}
	return batch
}

// Info describes the TPM and the AK.
func (p *Plugin) Info(ctx context.Context, _ *tpmv1.InfoRequest) (_ *tpmv1.InfoResponse, err error) {
	defer p.recover("Info", &err)
	n, err := p.configured()
	if err != nil {
		return nil, err
	}
	i, err := n.dev.Info(ctx)
	if err != nil {
		return nil, deviceStatus("describe the TPM", err)
	}
	ek, err := n.dev.EK(ctx)
	if err != nil {
		return nil, deviceStatus("read the EK", err)
	}
	ak, err := n.dev.AK(ctx)
	if err != nil {
		return nil, deviceStatus("load the AK", err)
	}
	hash := ek.Hash()
	res := &tpmv1.InfoResponse{
		AgentIdPath:  wire.AgentIDPath(hash),
		EkSha256:     hash[:],
		Manufacturer: i.Manufacturer,
		Firmware:     i.Firmware,
		Software:     i.Software,
		AkName:       ak.Name,
		ResetCount:   uint64(i.ResetCount),
		RestartCount: uint64(i.RestartCount),
		Device:       n.dev.Address().String(),
	}
	chain, err := n.dev.AKCertificate(ak)
	switch {
	case err == nil:
		res.AkCertificate = chain[0]
	case !errors.Is(err, tpm.ErrNoAKCertificate):
		return nil, deviceStatus("AK certificate", err)
	}
	return res, nil
}
