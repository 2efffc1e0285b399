package tlog_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/tlog"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

const origin = "log.example.org"

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func config(dir string) tlog.Config { return tlog.Config{DataDir: dir, Origin: origin, Log: quiet} }

func open(t testing.TB, dir string) *tlog.Log {
	t.Helper()
	l, err := tlog.Open(t.Context(), config(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// signer writes entries.
type signer struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newSigner(t testing.TB) *signer {
	key := forge.P256(t)
	return &signer{key, forge.Sign(t, &x509.Certificate{NotBefore: forge.Epoch(), NotAfter: forge.Epoch().AddDate(1, 0, 0)}, nil, key.Public(), key)}
}

func (s *signer) body(t testing.TB, what string) []byte {
	t.Helper()
	digest := sha256.Sum256([]byte(what))
	sig, err := s.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	body, err := pub.EntryBody(digest, sig, s.cert)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func mustAppend(t testing.TB, l *tlog.Log, body []byte) *rekorv1.TransparencyLogEntry {
	t.Helper()
	e, err := l.Append(t.Context(), body)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pub.Verify(e, body, []pub.Log{l.Info()}, nil); err != nil {
		t.Fatal(err)
	}
	return e
}

// check re-verifies a log with our reader and with the library's.
func check(t testing.TB, dir string, info pub.Log) *pub.Checkpoint {
	t.Helper()
	cp, _, err := tlog.CheckTree(t.Context(), tlog.FromDir(dir), info, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	v, err := note.NewVerifier(pub.VKey(info.Origin, info.Key.(ed25519.PublicKey)))
	if err != nil {
		t.Fatal(err)
	}
	hash := func(raw []byte) (out [][]byte, err error) {
		var b api.EntryBundle
		if err := b.UnmarshalText(raw); err != nil {
			return nil, err
		}
		for _, e := range b.Entries {
			out = append(out, rfc6962.DefaultHasher.HashLeaf(e))
		}
		return out, nil
	}
	if err := fsck.New(info.Origin, v, tlog.FromDir(dir), hash, fsck.Opts{N: 2}).Check(t.Context()); err != nil {
		t.Fatalf("the library's own check: %v", err)
	}
	return cp
}

func TestAppend(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	s := newSigner(t)
	const n = 300 // more than one tile
	var wg sync.WaitGroup
	seen := make([]uint64, n)
	for i := range n {
		wg.Go(func() {
			body := s.body(t, string(rune('a'+i)))
			e, err := l.Append(t.Context(), body)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := pub.Verify(e, body, []pub.Log{l.Info()}, nil); err != nil {
				t.Error(err)
			}
			seen[i] = uint64(e.LogIndex)
		})
	}
	wg.Wait()
	slices.Sort(seen)
	for i, idx := range seen {
		if uint64(i) != idx {
			t.Fatalf("index %d at place %d", idx, i)
		}
	}
	if cp := check(t, dir, l.Info()); cp.Size != n {
		t.Errorf("size %d", cp.Size)
	}
}

// Retried by somebody who did not get the answer, an entry is the same entry.
func TestDuplicatesAreOneEntry(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	body := newSigner(t).body(t, "once")
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if e, err := l.Append(t.Context(), body); err != nil || e.LogIndex != 0 {
				t.Errorf("%v, %v", err, e)
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir)
	if e := mustAppend(t, l, body); e.LogIndex != 0 {
		t.Errorf("another entry after a restart: %d", e.LogIndex)
	}
	// The index is made again from the log.
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		os.Remove(filepath.Join(dir, tlog.IndexFile+suffix))
	}
	l = open(t, dir)
	if e := mustAppend(t, l, body); e.LogIndex != 0 {
		t.Errorf("another entry without the index: %d", e.LogIndex)
	}
	if cp := check(t, dir, l.Info()); cp.Size != 1 {
		t.Errorf("size %d", cp.Size)
	}
}

func TestCertificateProof(t *testing.T) {
	l := open(t, t.TempDir())
	ca := forge.NewAttestationCA(t, nil)
	digest := sha256.Sum256(ca.Cert.Raw)
	sig, err := ca.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	body, err := pub.CertificateBody(ca.Cert, sig, ca.Cert)
	if err != nil {
		t.Fatal(err)
	}
	// Whoever may write could otherwise put an entry of his own in the way.
	squatter := newSigner(t)
	squat, err := squatter.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	squatBody, err := pub.EntryBody(digest, squat, squatter.cert)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, l, squatBody)
	if _, err := l.CertificateProof(t.Context(), digest); !errors.Is(err, tlog.ErrNotLogged) {
		t.Errorf("got %v", err)
	}
	if _, err := l.Integrate(t.Context(), body); err != nil {
		t.Fatal(err)
	}
	e, err := l.CertificateProof(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pub.VerifyCertificate(e, ca.Cert, ca.Cert, []pub.Log{l.Info()}, nil); err != nil {
		t.Error(err)
	}
}

// A server that dies after an entry was published and before its answer went
// out: nothing acknowledged is missing, and the retry finds the same entry.
func TestKilledBetweenAppendAndAnswer(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	s := newSigner(t)
	var acknowledged [][]byte
	for _, what := range []string{"a", "b", "c"} {
		body := s.body(t, what)
		mustAppend(t, l, body)
		acknowledged = append(acknowledged, body)
	}
	crashed := t.TempDir()
	tlog.BeforeAnswer(l, func() { copyDir(t, dir, crashed) }) // what a crash leaves
	last := s.body(t, "not answered")
	mustAppend(t, l, last)

	l = open(t, crashed)
	for i, body := range append(acknowledged, last) {
		if e := mustAppend(t, l, body); e.LogIndex != int64(i) {
			t.Errorf("entry %d is now %d", i, e.LogIndex)
		}
	}
	if cp := check(t, crashed, l.Info()); cp.Size != 4 {
		t.Errorf("size %d", cp.Size)
	}
}

// Wherever a crash cuts the writing of files, what was acknowledged before is
// there after, and the log goes on.
func TestCrashAtAnyMoment(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	s := newSigner(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var mu sync.Mutex
	acknowledged := map[int64][]byte{}
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				body := s.body(t, rand.Text())
				e, err := l.Append(ctx, body)
				if err != nil {
					return
				}
				mu.Lock()
				acknowledged[e.LogIndex] = body
				mu.Unlock()
			}
		})
	}
	for range 10 {
		// Not at one instant, as a crash would be, but each file whole: files
		// appear by rename, and the copy takes the checkpoint first, so that
		// what it covers was there when the rest is copied.
		crashed := t.TempDir()
		mu.Lock()
		promised := make(map[int64][]byte, len(acknowledged))
		for i, b := range acknowledged {
			promised[i] = b
		}
		mu.Unlock()
		copyDir(t, dir, crashed)
		again, err := tlog.Open(t.Context(), config(crashed))
		if err != nil {
			t.Fatal(err)
		}
		mustAppend(t, again, s.body(t, rand.Text()))
		cp := check(t, crashed, again.Info())
		for i, want := range promised {
			if uint64(i) >= cp.Size {
				t.Fatalf("entry %d was acknowledged, the log has %d", i, cp.Size)
			}
			if got, err := again.Entry(t.Context(), uint64(i)); err != nil || string(got) != string(want) {
				t.Fatalf("entry %d is another now (%v)", i, err)
			}
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	}
	cancel()
	wg.Wait()
}

// copyDir copies a live data directory. Tree state before tiles before entries
// is the order in which a reader depends on them.
func copyDir(t testing.TB, from, to string) {
	t.Helper()
	first := []string{tlog.KeyFile, "log/checkpoint", "log/.state/treeState"}
	cp := func(rel string) {
		b, err := os.ReadFile(filepath.Join(from, rel))
		if errors.Is(err, os.ErrNotExist) {
			return // a temporary file, renamed meanwhile
		}
		if err == nil {
			if err = os.MkdirAll(filepath.Join(to, filepath.Dir(rel)), 0o700); err == nil {
				err = os.WriteFile(filepath.Join(to, rel), b, 0o600)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, rel := range first {
		cp(rel)
	}
	err := filepath.WalkDir(filepath.Join(from, tlog.Dir), func(path string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err == nil && !d.IsDir() && !slices.Contains(first, rel) {
			cp(rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRefusesToOpen(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	mustAppend(t, l, newSigner(t).body(t, "entry"))
	if _, err := tlog.Open(t.Context(), config(dir)); !errors.Is(err, tlog.ErrInUse) {
		t.Errorf("a log in use: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(t.Context(), newSigner(t).body(t, "late")); !errors.Is(err, tlog.ErrClosed) {
		t.Errorf("append after close: %v", err)
	}
	damaged := func(name string, damage func(dir string), c func(dir string) tlog.Config, want error) {
		t.Helper()
		d := t.TempDir()
		if err := os.CopyFS(d, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		os.Chmod(filepath.Join(d, tlog.KeyFile), 0o600)
		damage(d)
		again, err := tlog.Open(t.Context(), c(d))
		if err == nil {
			again.Close()
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", name, err, want)
		}
	}
	other := t.TempDir()
	open(t, other)
	damaged("another origin", func(string) {}, func(d string) tlog.Config {
		return tlog.Config{DataDir: d, Origin: "log.example.net", Log: quiet}
	}, tlog.ErrOrigin)
	damaged("no key", func(d string) { os.Remove(filepath.Join(d, tlog.KeyFile)) }, config, tlog.ErrLost)
	damaged("another key", func(d string) {
		b, err := os.ReadFile(filepath.Join(other, tlog.KeyFile))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, tlog.KeyFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}, config, tlog.ErrLost)
	// A log put back to an older state would fork at its next entry.
	damaged("rolled back", func(d string) {
		os.RemoveAll(filepath.Join(d, tlog.Dir))
	}, config, tlog.ErrLost)
}

func TestRefusesTamperedTree(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	s := newSigner(t)
	var wg sync.WaitGroup
	for range 260 {
		wg.Go(func() {
			if _, err := l.Append(t.Context(), s.body(t, rand.Text())); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	info := l.Info()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"tile/0/000", "tile/1/000.p/1", "tile/0/001.p/4", "tile/entries/000", "tile/entries/001.p/4", "checkpoint"} {
		path := filepath.Join(dir, tlog.Dir, filepath.FromSlash(name))
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bad := slices.Clone(good)
		bad[len(bad)/2] ^= 1
		for what, b := range map[string][]byte{"changed": bad, "cut": good[:len(good)-1], "emptied": nil} {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, _, err := tlog.CheckTree(t.Context(), tlog.FromDir(dir), info, nil, nil); !errors.Is(err, tlog.ErrLost) && !errors.Is(err, pub.ErrCheckpoint) {
				t.Errorf("%s %s: %v", name, what, err)
			}
		}
		if name != "checkpoint" {
			os.Remove(path)
			if _, _, err := tlog.CheckTree(t.Context(), tlog.FromDir(dir), info, nil, nil); !errors.Is(err, tlog.ErrLost) {
				t.Errorf("%s removed: %v", name, err)
			}
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check(t, dir, info)
}

func TestConsistencyOfCheckpoints(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	s := newSigner(t)
	at := func() pub.Checkpoint {
		e := mustAppend(t, l, s.body(t, rand.Text()))
		in, err := pub.Verify(e, e.CanonicalizedBody, []pub.Log{l.Info()}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return in.Checkpoint()
	}
	old := at()
	at()
	now := at()
	if err := tlog.CheckConsistent(t.Context(), tlog.FromDir(dir), old, now); err != nil {
		t.Error(err)
	}
	old.Root[0] ^= 1
	if err := tlog.CheckConsistent(t.Context(), tlog.FromDir(dir), old, now); !errors.Is(err, pub.ErrFork) {
		t.Errorf("a fork: %v", err)
	}
}

// The figure: entries that come at 1,000 a second are in a published checkpoint
// within half a second each.
func BenchmarkAppendToCheckpoint(b *testing.B) {
	l := open(b, b.TempDir())
	s := newSigner(b)
	bodies := make([][]byte, max(b.N, 1))
	for i := range bodies {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(i))
		bodies[i] = s.body(b, string(n[:]))
	}
	const perSecond = 1000
	took := make([]time.Duration, b.N)
	var wg sync.WaitGroup
	tick := time.NewTicker(time.Second / perSecond)
	defer tick.Stop()
	b.ResetTimer()
	for i := range b.N {
		<-tick.C
		wg.Go(func() {
			start := time.Now()
			if _, err := l.Append(b.Context(), bodies[i]); err != nil {
				b.Error(err)
			}
			took[i] = time.Since(start)
		})
	}
	wg.Wait()
	slices.Sort(took)
	ms := func(p float64) float64 { return float64(took[int(p*float64(len(took)-1))]) / float64(time.Millisecond) }
	b.ReportMetric(ms(0.5), "ms-p50")
	b.ReportMetric(ms(0.99), "ms-p99")
	b.ReportMetric(ms(1), "ms-max")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}
