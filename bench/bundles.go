package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rootlink/rootlink/bench/figures"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

const (
	bundles          = 10000
	bundleIdentities = 100
	bundleCallers    = 200
	bundlePath       = "/bundle"
)

// product is what bundle i is about.
func product(i int) (name string, digest [32]byte) {
	name = fmt.Sprintf("out/%d", i)
	return name, sha256.Sum256([]byte(name))
}

// bundlerMain makes many links, each with a key, an SVID, a token and a log
// entry of its own, by all that `rootlink run` asks of agent, TPM and server.
func bundlerMain(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(roleBundler, flag.ContinueOnError)
	socket := fs.String("socket", "", "")
	web := fs.String("web", "", "")
	dir := fs.String("dir", "", "")
	n := fs.Int("n", 1, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	callers, err := newCallers(bundleCallers, *web)
	if err != nil {
		return err
	}
	defer closeAll(callers)
	var signing sync.WaitGroup
	var failed atomic.Pointer[error]
	for first := 0; first < *n; first += bundleCallers {
		// A measurement stands for one statement. These are measured while those
		// before them wait for the log.
		steps, err := measuredSteps(ctx, *socket, min(bundleCallers, *n-first), func(i int) string {
			return fmt.Sprintf("spiffe://%s%s/%d", trustDomain, bundlePath, i%bundleIdentities)
		})
		if err != nil {
			return err
		}
		signing.Wait()
		for i, s := range steps {
			signing.Go(func() {
				defer s.conn.Close()
				raw, err := s.bundle(ctx, first+i, callers[i])
				if err == nil {
					err = os.WriteFile(filepath.Join(*dir, fmt.Sprint(first+i)), raw, 0o600)
				}
				if err != nil {
					failed.CompareAndSwap(nil, &err)
				}
			})
		}
		if failed.Load() != nil {
			break
		}
	}
	signing.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// bundle is one step from its end to the finished bundle.
func (s *step) bundle(ctx context.Context, i int, web *caller) ([]byte, error) {
	name, digest := product(i)
	zero := 0
	p, err := link.Prepare(&link.Statement{
		Step: "bench", Command: []string{"true"}, Byproducts: link.Byproducts{ExitCode: &zero},
		Subjects: []link.Resource{{Name: name, Digest: map[string]string{"sha256": hex.EncodeToString(digest[:])}}},
	})
	if err != nil {
		return nil, err
	}
	key, leaf, _, err := s.certify(ctx, p.Digest())
	if err != nil {
		return nil, err
	}
	b, err := p.Sign(key, leaf)
	if err != nil {
		return nil, err
	}
	query, err := timestamp.Request(b.Signature(), big.NewInt(int64(i)+1))
	if err != nil {
		return nil, err
	}
	token, err := web.post("/tsa", timestamp.QueryType, query)
	if err != nil {
		return nil, err
	}
	if b, err = b.WithTimestamps(token); err != nil {
		return nil, err
	}
	req, err := entryRequest(p.Digest(), b.Signature(), leaf)
	if err != nil {
		return nil, err
	}
	raw, err := web.post("/log/api/v2/log/entries", "application/json", req)
	if err != nil {
		return nil, err
	}
	e, err := tlog.ParseEntry(raw)
	if err != nil {
		return nil, err
	}
	if b, err = b.WithLogEntry(e); err != nil {
		return nil, err
	}
	return b.Marshal()
}

// certify gets a new key certified for the statement with the given digest, in
// the two calls that `rootlink run` makes when a tool has ended. prepared is
// when the TPM had committed to the key.
func (s *step) certify(ctx context.Context, digest [32]byte) (key *ecdsa.PrivateKey, leaf *x509.Certificate, prepared time.Time, err error) {
	ctx, cancel := context.WithTimeout(withHeader(ctx), time.Minute)
	defer cancel()
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, prepared, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, nil, prepared, err
	}
	evidence, err := s.Prepare(ctx, &workloadv1.PrepareRequest{Spki: spki, PayloadSha256: digest[:]})
	if err != nil {
		return nil, nil, prepared, err
	}
	prepared = time.Now()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 35}, Value: evidence.GetEvidence()}}, // id-pe-cmw
	}, key)
	if err != nil {
		return nil, nil, prepared, err
	}
	issued, err := s.Issue(ctx, &workloadv1.IssueRequest{Csr: csr})
	if err != nil {
		return nil, nil, prepared, err
	}
	if len(issued.GetX509Svid()) == 0 {
		return nil, nil, prepared, errors.New("no SVID in the answer")
	}
	if leaf, err = x509.ParseCertificate(issued.GetX509Svid()[0]); err != nil {
		return nil, nil, prepared, err
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, nil, prepared, errors.New("an SVID for another key")
	}
	return key, leaf, prepared, nil
}

// manyBundles: 10,000 of them, each with a token and a log entry, read from
// files and verified, as many at a time as there are cores.
func manyBundles(ctx context.Context, b *bench) error {
	dir := b.path("bundles")
	defer os.RemoveAll(dir)
	made, err := b.makeBundles(ctx, dir)
	if err != nil {
		return err
	}
	trust, err := b.trust(ctx)
	if err != nil {
		return err
	}
	if b.profile != "" {
		stop, err := startProfile(b.profile + "/verify")
		if err != nil {
			return err
		}
		defer stop()
	}
	var all, cpu figures.Samples
	for range b.runs {
		before, start := spent(), time.Now()
		if err := verifyAll(dir, trust); err != nil {
			return err
		}
		all, cpu = append(all, time.Since(start)), append(cpu, spent()-before)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	floor, err := checkFloor()
	if err != nil {
		return err
	}
	b.out.Most(fmt.Sprintf("verify %d bundles, all cores", bundles), all, 10*time.Second,
		fmt.Sprintf("CPU time for one: %s; the P-256 checks that each needs alone (statement, SVID, token): %s; making them, with token and log entry: %.0f/s",
			figures.Short(cpu.Median()/bundles), figures.Short(floor), bundles/made.Seconds()))
	return nil
}

func (b *bench) makeBundles(ctx context.Context, dir string) (time.Duration, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return 0, err
	}
	t, err := tool()
	if err != nil {
		return 0, err
	}
	for i := range bundleIdentities {
		if err := b.createStep(ctx, fmt.Sprintf("%s/%d", bundlePath, i), b.self, t); err != nil {
			return 0, err
		}
	}
	c := exec.CommandContext(ctx, b.self, roleBundler, "--socket", b.socket(), "--web", b.web, "--dir", dir, "--n", fmt.Sprint(bundles))
	c.Stderr = os.Stderr
	start := time.Now()
	err = c.Run()
	return time.Since(start), err
}

// verifyAll reads and verifies every bundle with its artifact.
func verifyAll(dir string, trust *link.Trust) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, runtime.GOMAXPROCS(0))
	for w := range errs {
		wg.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= bundles {
					return
				}
				errs[w] = verifyOne(dir, i, trust)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func verifyOne(dir string, i int, trust *link.Trust) error {
	raw, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i)))
	if err != nil {
		return err
	}
	name, digest := product(i)
	res, err := link.Verify(link.Input{
		Identity:  "spiffe://" + trustDomain + bundlePath + "/*",
		Links:     []link.LinkInput{{Name: name, Bundle: raw}},
		Artifacts: []link.Artifact{{Name: name, Digest: map[string]string{"sha256": hex.EncodeToString(digest[:])}}},
	}, trust, time.Now())
	if err != nil {
		return fmt.Errorf("bundle %d: %w", i, err)
	}
	if t := res.Links[0].Time; !t.Attested || len(t.Logs) == 0 || !t.Logs[0].Counted {
		return fmt.Errorf("bundle %d: without a token or log entry that counts", i)
	}
	return nil
}

// checkFloor is how long three signature checks take one core: what nobody can
// leave out for a bundle whose certificates above the SVID were all seen before.
func checkFloor() (time.Duration, error) {
	one, err := verifyTime()
	return 3 * one, err
}
