package tlog_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"strings"
	"testing"
	"time"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/tlog"
)

const origin = "log.example.org"

// world is a log with other entries around the one of interest.
type world struct {
	log    *forge.Log
	other  *forge.Log
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	digest [32]byte
	sig    []byte
	body   []byte
	index  uint64
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{log: forge.NewLog(t, origin), other: forge.NewLog(t, "other.example.org"), key: forge.P256(t), digest: sha256.Sum256([]byte("statement"))}
	w.cert = forge.Sign(t, &x509.Certificate{NotBefore: forge.Epoch(), NotAfter: forge.Epoch().AddDate(1, 0, 0)}, nil, w.key.Public(), w.key)
	var err error
	if w.sig, err = w.key.Sign(rand.Reader, w.digest[:], crypto.SHA256); err != nil {
		t.Fatal(err)
	}
	if w.body, err = tlog.EntryBody(w.digest, w.sig, w.cert); err != nil {
		t.Fatal(err)
	}
	w.log.Fill(5)
	w.index = w.log.Append(w.body)
	w.log.Fill(7)
	return w
}

func (w *world) logs() []tlog.Log { return []tlog.Log{w.other.Info(), w.log.Info()} }

func (w *world) verify(e *rekorv1.TransparencyLogEntry, ws ...tlog.Witness) (*tlog.Included, error) {
	return tlog.Verify(e, w.body, w.logs(), ws)
}

func TestEntryVerifies(t *testing.T) {
	w := newWorld(t)
	for size := w.index + 1; size <= uint64(len(w.log.Bodies)); size++ {
		in, err := w.verify(w.log.EntryAt(w.index, size))
		if err != nil {
			t.Fatalf("size %d: %v", size, err)
		}
		if in.Log.Origin != origin || in.Index != w.index || in.Size != size || in.Root != w.log.Root(size) || len(in.Cosigned) != 0 {
			t.Errorf("size %d: %+v", size, in)
		}
	}
}

// The form is Sigstore's, to the byte: its verifiers rebuild it.
func TestBodyIsCanonical(t *testing.T) {
	w := newWorld(t)
	b64 := base64.StdEncoding.EncodeToString
	want := `{"apiVersion":"0.0.2","kind":"hashedrekord","spec":{"hashedRekordV002":{"data":{"algorithm":"SHA2_256","digest":"` + b64(w.digest[:]) +
		`"},"signature":{"content":"` + b64(w.sig) + `","verifier":{"keyDetails":"PKIX_ECDSA_P256_SHA_256","x509Certificate":{"rawBytes":"` + b64(w.cert.Raw) + `"}}}}}}`
	if string(w.body) != want {
		t.Errorf("got  %s\nwant %s", w.body, want)
	}
	e, err := tlog.ParseBody(w.body)
	if err != nil {
		t.Fatal(err)
	}
	if e.Digest != w.digest || !bytes.Equal(e.Signature, w.sig) || !e.Certificate.Equal(w.cert) {
		t.Error("it reads as something else")
	}
	if err := e.CheckSignature(); err != nil {
		t.Error(err)
	}
}

func TestEntryJSON(t *testing.T) {
	w := newWorld(t)
	w.log.Witnesses = []*forge.LogWitness{forge.NewLogWitness(t, "witness", forge.Epoch())}
	e := w.log.Entry(w.index)
	raw, err := tlog.MarshalEntry(e)
	if err != nil {
		t.Fatal(err)
	}
	back, err := tlog.ParseEntry(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(e, back) {
		t.Error("it reads as something else")
	}
	again, err := tlog.MarshalEntry(back)
	if err != nil || !bytes.Equal(raw, again) {
		t.Errorf("not the same bytes again (%v)", err)
	}
}

func TestRefusesEntries(t *testing.T) {
	w := newWorld(t)
	size := uint64(len(w.log.Bodies))
	stranger := forge.NewLog(t, origin) // the name is right, the key is not
	stranger.Bodies = w.log.Bodies
	elsewhere := &forge.Log{Origin: "log.example.net", Key: w.log.Key, Bodies: w.log.Bodies}
	liar := &forge.Log{Origin: origin, Key: w.log.Key}
	liar.Fill(int(size))
	other, err := tlog.EntryBody(sha256.Sum256([]byte("another")), w.sig, w.cert)
	if err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		bend func(*rekorv1.TransparencyLogEntry)
		want error
	}{
		"a proof for another entry": {func(e *rekorv1.TransparencyLogEntry) {
			proto.Reset(e)
			proto.Merge(e, w.log.Entry(2))
			e.CanonicalizedBody = w.body
		}, tlog.ErrNotIncluded},
		"an entry with another body": {func(e *rekorv1.TransparencyLogEntry) { e.CanonicalizedBody = other }, tlog.ErrOtherEntry},
		"another log": {func(e *rekorv1.TransparencyLogEntry) {
			proto.Reset(e)
			proto.Merge(e, elsewhere.Entry(w.index))
		}, tlog.ErrUnknownLog},
		"another log under this one's name": {func(e *rekorv1.TransparencyLogEntry) {
			proto.Reset(e)
			proto.Merge(e, stranger.Entry(w.index))
		}, tlog.ErrUnknownLog},
		"a checkpoint by another key": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Checkpoint.Envelope = stranger.Checkpoint(size)
		}, tlog.ErrCheckpoint},
		"a checkpoint of another origin by this key": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Checkpoint.Envelope = elsewhere.Checkpoint(size)
		}, tlog.ErrCheckpoint},
		"this log's signature under another origin's text": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Checkpoint.Envelope = w.log.SignText(elsewhere.Text(size))
		}, tlog.ErrCheckpoint},
		"a smaller tree's checkpoint": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Checkpoint.Envelope = w.log.Checkpoint(w.index + 1)
		}, tlog.ErrNotIncluded},
		"a smaller tree without it": {func(e *rekorv1.TransparencyLogEntry) {
			root := w.log.Root(w.index)
			e.InclusionProof.Checkpoint.Envelope = w.log.Checkpoint(w.index)
			e.InclusionProof.TreeSize, e.InclusionProof.RootHash = int64(w.index), root[:]
		}, tlog.ErrNotIncluded},
		"a forked tree's checkpoint": {func(e *rekorv1.TransparencyLogEntry) {
			root := liar.Root(size)
			e.InclusionProof.Checkpoint.Envelope, e.InclusionProof.RootHash = liar.Checkpoint(size), root[:]
		}, tlog.ErrNotIncluded},
		"a wrong index": {func(e *rekorv1.TransparencyLogEntry) { e.LogIndex++; e.InclusionProof.LogIndex++ }, tlog.ErrNotIncluded},
		"two indexes":   {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof.LogIndex++ }, tlog.ErrMalformed},
		"an index past the tree": {func(e *rekorv1.TransparencyLogEntry) {
			e.LogIndex, e.InclusionProof.LogIndex = int64(size), int64(size)
		}, tlog.ErrNotIncluded},
		"a negative index":  {func(e *rekorv1.TransparencyLogEntry) { e.LogIndex, e.InclusionProof.LogIndex = -1, -1 }, tlog.ErrMalformed},
		"another tree size": {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof.TreeSize++ }, tlog.ErrNotIncluded},
		"another root":      {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof.RootHash[0] ^= 1 }, tlog.ErrNotIncluded},
		"a changed hash":    {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof.Hashes[1][3] ^= 1 }, tlog.ErrNotIncluded},
		"a hash too few":    {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof.Hashes = e.InclusionProof.Hashes[1:] }, tlog.ErrNotIncluded},
		"a hash too many": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Hashes = append(e.InclusionProof.Hashes, make([]byte, 32))
		}, tlog.ErrNotIncluded},
		"a short hash":         {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof.Hashes[0] = e.InclusionProof.Hashes[0][:31] }, tlog.ErrMalformed},
		"a proof without end":  {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof.Hashes = make([][]byte, 65) }, tlog.ErrMalformed},
		"no proof":             {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof = nil }, tlog.ErrMalformed},
		"no checkpoint":        {func(e *rekorv1.TransparencyLogEntry) { e.InclusionProof.Checkpoint = nil }, tlog.ErrMalformed},
		"no log ID":            {func(e *rekorv1.TransparencyLogEntry) { e.LogId = nil }, tlog.ErrMalformed},
		"no body":              {func(e *rekorv1.TransparencyLogEntry) { e.CanonicalizedBody = nil }, tlog.ErrMalformed},
		"no kind":              {func(e *rekorv1.TransparencyLogEntry) { e.KindVersion = nil }, tlog.ErrMalformed},
		"another kind":         {func(e *rekorv1.TransparencyLogEntry) { e.KindVersion.Kind = "dsse" }, tlog.ErrMalformed},
		"an older version":     {func(e *rekorv1.TransparencyLogEntry) { e.KindVersion.Version = "0.0.1" }, tlog.ErrMalformed},
		"a time nobody signed": {func(e *rekorv1.TransparencyLogEntry) { e.IntegratedTime = 1 }, tlog.ErrMalformed},
		"a promise":            {func(e *rekorv1.TransparencyLogEntry) { e.InclusionPromise = &rekorv1.InclusionPromise{} }, tlog.ErrMalformed},
		"a body without end":   {func(e *rekorv1.TransparencyLogEntry) { e.CanonicalizedBody = make([]byte, tlog.MaxBody+1) }, tlog.ErrMalformed},
		"a checkpoint of garbage": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Checkpoint.Envelope = "garbage"
		}, tlog.ErrCheckpoint},
		"a checkpoint without end": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Checkpoint.Envelope += strings.Repeat("\u2014 x AAAA\n", tlog.MaxCheckpoint/9)
		}, tlog.ErrMalformed},
		"a checkpoint with 101 signatures": {func(e *rekorv1.TransparencyLogEntry) {
			for range 100 {
				e.InclusionProof.Checkpoint.Envelope += "\u2014 x AAAAAAAA\n"
			}
		}, tlog.ErrCheckpoint},
		"a size with a leading zero": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Checkpoint.Envelope = w.log.SignText(bytes.Replace(w.log.Text(size), []byte("\n"), []byte("\n0"), 1))
		}, tlog.ErrCheckpoint},
		"a signed text that is no checkpoint": {func(e *rekorv1.TransparencyLogEntry) {
			e.InclusionProof.Checkpoint.Envelope = w.log.SignText([]byte(origin + "\nhello\n"))
		}, tlog.ErrCheckpoint},
	} {
		t.Run(name, func(t *testing.T) {
			e := proto.CloneOf(w.log.Entry(w.index))
			c.bend(e)
			if _, err := w.verify(e); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	if _, err := w.verify(nil); !errors.Is(err, tlog.ErrMalformed) {
		t.Errorf("no entry: %v", err)
	}
	if _, err := tlog.Verify(w.log.Entry(w.index), nil, w.logs(), nil); !errors.Is(err, tlog.ErrMalformed) {
		t.Errorf("no body to look for: %v", err)
	}
	if _, err := tlog.Verify(w.log.Entry(w.index), w.body, nil, nil); !errors.Is(err, tlog.ErrUnknownLog) {
		t.Errorf("no known log: %v", err)
	}
}

func TestCosignatures(t *testing.T) {
	w := newWorld(t)
	a := forge.NewLogWitness(t, "a.example.com", forge.Epoch())
	b := forge.NewLogWitness(t, "b.example.com", forge.Epoch().Add(time.Minute))
	w.log.Witnesses = []*forge.LogWitness{a, b}
	in, err := w.verify(w.log.Entry(w.index), a.Info(), b.Info())
	if err != nil {
		t.Fatal(err)
	}
	if len(in.Cosigned) != 2 || in.Cosigned[0].Witness.Name != a.Name || !in.Cosigned[0].Time.Equal(a.Time) || !in.Cosigned[1].Time.Equal(b.Time) {
		t.Errorf("%+v", in.Cosigned)
	}
}

func TestRefusesCosignatures(t *testing.T) {
	w := newWorld(t)
	a := forge.NewLogWitness(t, "a.example.com", forge.Epoch())
	later := &forge.LogWitness{Name: a.Name, Key: a.Key, Time: a.Time.Add(time.Hour)}
	alias := &forge.LogWitness{Name: "alias.example.com", Key: a.Key, Time: a.Time}
	unknown := forge.NewLogWitness(t, "unknown.example.com", forge.Epoch())
	pretender := forge.NewLogWitness(t, a.Name, forge.Epoch())
	self := &forge.LogWitness{Name: "self.example.com", Key: w.log.Key, Time: forge.Epoch()}
	window := func(i tlog.Witness, start, end time.Time) tlog.Witness {
		i.Start, i.End = start, end
		return i
	}

	for name, c := range map[string]struct {
		by    []*forge.LogWitness
		known []tlog.Witness
		want  int
	}{
		"one witness twice":                  {[]*forge.LogWitness{a, later}, []tlog.Witness{a.Info()}, 1},
		"one witness listed twice":           {[]*forge.LogWitness{a}, []tlog.Witness{a.Info(), a.Info()}, 1},
		"one key under two names":            {[]*forge.LogWitness{a, alias}, []tlog.Witness{a.Info(), alias.Info()}, 1},
		"an unknown witness":                 {[]*forge.LogWitness{unknown}, []tlog.Witness{a.Info()}, 0},
		"another key under a witness's name": {[]*forge.LogWitness{pretender}, []tlog.Witness{a.Info()}, 0},
		"the log as its own witness":         {[]*forge.LogWitness{self}, []tlog.Witness{self.Info()}, 0},
		"before the window":                  {[]*forge.LogWitness{a}, []tlog.Witness{window(a.Info(), a.Time.Add(time.Second), time.Time{})}, 0},
		"after the window":                   {[]*forge.LogWitness{a}, []tlog.Witness{window(a.Info(), time.Time{}, a.Time.Add(-time.Second))}, 0},
		"inside the second of two windows": {[]*forge.LogWitness{a}, []tlog.Witness{
			window(a.Info(), time.Time{}, a.Time.Add(-time.Second)), window(a.Info(), a.Time, time.Time{}),
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			w.log.Witnesses = c.by
			in, err := w.verify(w.log.Entry(w.index), c.known...)
			if err != nil {
				t.Fatal(err)
			}
			if len(in.Cosigned) != c.want {
				t.Errorf("counted %d, want %d", len(in.Cosigned), c.want)
			}
		})
	}

	t.Run("a bad one by a known witness", func(t *testing.T) {
		w.log.Witnesses = nil
		e := w.log.Entry(w.index)
		e.InclusionProof.Checkpoint.Envelope += a.Cosign([]byte("another text\nof\nthree lines\n"))
		if _, err := w.verify(e, a.Info()); !errors.Is(err, tlog.ErrCheckpoint) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("witnesses alone, without the log", func(t *testing.T) {
		e := w.log.Entry(w.index)
		text := w.log.Text(uint64(len(w.log.Bodies)))
		e.InclusionProof.Checkpoint.Envelope = string(text) + "\n" + a.Cosign(text)
		if _, err := w.verify(e, a.Info()); !errors.Is(err, tlog.ErrCheckpoint) {
			t.Errorf("got %v", err)
		}
	})
}

func TestRefusesKeys(t *testing.T) {
	w := newWorld(t)
	good := forge.NewLogWitness(t, "a.example.com", forge.Epoch()).Info()
	e := w.log.Entry(w.index)
	name, rest, _ := strings.Cut(good.Key, "+")
	for _, key := range []string{"", "a", "a+b", name + "+00000000+" + rest[9:], good.Key[:len(good.Key)-4], name + " x+" + rest, strings.Repeat("x", 2000)} {
		bad := good
		bad.Key = key
		if _, err := w.verify(e, bad); !errors.Is(err, tlog.ErrKey) {
			t.Errorf("witness key %.80q: %v", key, err)
		}
		if bad.Check() == nil {
			t.Errorf("witness key %.80q passes Check", key)
		}
	}
	l := w.log.Info()
	for name, bend := range map[string]func(*tlog.Log){
		"no key":           func(l *tlog.Log) { l.Key = nil },
		"a key of another": func(l *tlog.Log) { l.Key = w.key.Public() },
		"a foreign ID":     func(l *tlog.Log) { l.ID = make([]byte, 32) },
		"no origin":        func(l *tlog.Log) { l.Origin = "" },
		"a bad origin":     func(l *tlog.Log) { l.Origin = "a+b" },
	} {
		bad := l
		bend(&bad)
		if _, err := tlog.Verify(e, w.body, []tlog.Log{bad}, nil); !errors.Is(err, tlog.ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	l.End = forge.Epoch()
	if err := l.ValidAt(forge.Epoch()); err != nil {
		t.Error(err)
	}
	if err := l.ValidAt(forge.Epoch().Add(1)); !errors.Is(err, tlog.ErrWindow) {
		t.Error(err)
	}
}

func TestConsistency(t *testing.T) {
	w := newWorld(t)
	at := func(l *forge.Log, size uint64) tlog.Checkpoint {
		return tlog.Checkpoint{Origin: origin, Size: size, Root: l.Root(size)}
	}
	n := uint64(len(w.log.Bodies))
	for a := uint64(0); a <= n; a++ {
		for b := a; b <= n; b++ {
			var proof [][]byte
			if a > 0 && a < b {
				proof = w.log.Consistency(a, b)
			}
			for _, err := range []error{tlog.CheckConsistent(at(w.log, a), at(w.log, b), proof), tlog.CheckConsistent(at(w.log, b), at(w.log, a), proof)} {
				if err != nil {
					t.Fatalf("%d to %d: %v", a, b, err)
				}
			}
		}
	}
}

func TestRefusesForks(t *testing.T) {
	w := newWorld(t)
	fork := &forge.Log{Origin: origin, Key: w.log.Key, Bodies: append([][]byte{[]byte("history rewritten")}, w.log.Bodies[1:]...)}
	at := func(l *forge.Log, size uint64) tlog.Checkpoint {
		return tlog.Checkpoint{Origin: l.Origin, Size: size, Root: l.Root(size)}
	}
	elsewhere := &forge.Log{Origin: "log.example.net", Key: w.log.Key, Bodies: w.log.Bodies}
	for name, c := range map[string]struct {
		a, b  tlog.Checkpoint
		proof [][]byte
		want  error
	}{
		"one size, two trees":            {at(w.log, 6), at(fork, 6), nil, tlog.ErrFork},
		"a later tree with other roots":  {at(w.log, 6), at(fork, 9), fork.Consistency(6, 9), tlog.ErrFork},
		"an older tree with other roots": {at(w.log, 9), at(fork, 6), w.log.Consistency(6, 9), tlog.ErrFork},
		"no proof":                       {at(w.log, 6), at(w.log, 9), nil, tlog.ErrUndecided},
		"a proof for other sizes":        {at(w.log, 6), at(w.log, 9), w.log.Consistency(5, 9), tlog.ErrFork},
		"another log":                    {at(w.log, 6), at(elsewhere, 6), nil, tlog.ErrOtherEntry},
		"a proof without end":            {at(w.log, 6), at(w.log, 9), make([][]byte, 65), tlog.ErrMalformed},
		"an empty tree with a root":      {tlog.Checkpoint{Origin: origin, Root: [32]byte{1}}, at(w.log, 9), nil, tlog.ErrFork},
	} {
		if err := tlog.CheckConsistent(c.a, c.b, c.proof); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

func TestCertificates(t *testing.T) {
	w := newWorld(t)
	ca := forge.NewAttestationCA(t, nil)
	other := forge.NewAttestationCA(t, nil)
	cert := forge.Sign(t, &x509.Certificate{NotBefore: forge.Epoch(), NotAfter: forge.Epoch().AddDate(1, 0, 0)}, ca.Cert, w.key.Public(), ca.Key)
	i := w.log.AppendCertificate(t, cert, ca.Cert, ca.Key)
	self := w.log.AppendCertificate(t, ca.Cert, ca.Cert, ca.Key)
	forged := w.log.AppendCertificate(t, cert, ca.Cert, other.Key)
	foreign := w.log.AppendCertificate(t, cert, other.Cert, other.Key)

	if in, err := tlog.VerifyCertificate(w.log.Entry(i), cert, ca.Cert, w.logs(), nil); err != nil || in.Index != i {
		t.Errorf("%v, %+v", err, in)
	}
	if _, err := tlog.VerifyCertificate(w.log.Entry(self), ca.Cert, ca.Cert, w.logs(), nil); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		index uint64
		cert  *x509.Certificate
		want  error
	}{
		"another certificate":                {i, other.Cert, tlog.ErrOtherEntry},
		"not signed by the issuer":           {forged, cert, tlog.ErrSignature},
		"logged by another CA":               {foreign, cert, tlog.ErrOtherEntry},
		"a bundle's entry for a certificate": {w.index, cert, tlog.ErrOtherEntry},
		"something that is no entry":         {0, cert, tlog.ErrMalformed},
		"nothing":                            {i, nil, tlog.ErrMalformed},
	} {
		if _, err := tlog.VerifyCertificate(w.log.Entry(c.index), c.cert, ca.Cert, w.logs(), nil); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

func TestRefusesBodies(t *testing.T) {
	w := newWorld(t)
	s := string(w.body)
	for name, raw := range map[string]string{
		"nothing":         "",
		"garbage":         "garbage",
		"a space":         s + " ",
		"another order":   `{"kind":"hashedrekord","apiVersion":"0.0.2",` + s[strings.Index(s, `"spec"`):],
		"a duplicate key": `{"apiVersion":"0.0.1",` + s[1:],
		"an unknown key":  `{"x":1,` + s[1:],
		"another kind":    strings.Replace(s, "hashedrekord", "dsse", 1),
		"another version": strings.Replace(s, "0.0.2", "0.0.1", 1),
		"another digest":  strings.Replace(s, "SHA2_256", "SHA2_512", 1),
		"another key":     strings.Replace(s, "P256", "P384", 1),
		"a long one":      s + strings.Repeat(" ", tlog.MaxBody),
	} {
		if _, err := tlog.ParseBody([]byte(raw)); !errors.Is(err, tlog.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := tlog.EntryBody(w.digest, make([]byte, tlog.MaxSignature+1), w.cert); !errors.Is(err, tlog.ErrMalformed) {
		t.Errorf("a long signature: %v", err)
	}
	if _, err := tlog.EntryBody(w.digest, nil, w.cert); !errors.Is(err, tlog.ErrMalformed) {
		t.Errorf("no signature: %v", err)
	}
	if _, err := tlog.EntryBody(w.digest, w.sig, nil); !errors.Is(err, tlog.ErrMalformed) {
		t.Errorf("no certificate: %v", err)
	}
	raw, err := tlog.MarshalEntry(w.log.Entry(w.index))
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string]string{
		"an unknown field":   `{"x":1,` + string(raw[1:]),
		"a duplicate field":  `{"logIndex":"5",` + string(raw[1:]),
		"an oversized entry": string(raw) + strings.Repeat(" ", tlog.MaxEntryJSON),
		"an empty entry":     "{}",
	} {
		if _, err := tlog.ParseEntry([]byte(raw)); !errors.Is(err, tlog.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzEntry(f *testing.F) {
	w := newWorld(f)
	witness := forge.NewLogWitness(f, "a.example.com", forge.Epoch())
	w.log.Witnesses = []*forge.LogWitness{witness}
	raw, err := tlog.MarshalEntry(w.log.Entry(w.index))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte("{}"))
	f.Add(bytes.Replace(raw, []byte("log.example.org"), []byte("log.example.net"), 1))
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := tlog.ParseEntry(raw)
		if err != nil {
			return
		}
		again, err := tlog.MarshalEntry(e)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := tlog.ParseEntry(again); err != nil || !proto.Equal(e, back) {
			t.Fatalf("%v: %s", err, again)
		}
		if in, err := w.verify(e, witness.Info()); err == nil && in.Index != w.index {
			t.Fatalf("forged: %s", raw)
		}
	})
}

func FuzzBody(f *testing.F) {
	w := newWorld(f)
	f.Add(w.body)
	f.Add([]byte(`{"apiVersion":"0.0.2","kind":"hashedrekord","spec":{"hashedRekordV002":{}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := tlog.ParseBody(raw)
		if err != nil {
			return
		}
		if again, err := tlog.EntryBody(e.Digest, e.Signature, e.Certificate); err != nil || !bytes.Equal(raw, again) {
			t.Fatalf("%v: %s", err, again)
		}
	})
}

func FuzzCheckpoint(f *testing.F) {
	w := newWorld(f)
	l := w.log.Info()
	witness := forge.NewLogWitness(f, "a.example.com", forge.Epoch())
	w.log.Witnesses = []*forge.LogWitness{witness}
	signed := w.log.Checkpoint(9)
	f.Add([]byte(signed))
	f.Add([]byte(w.log.SignText([]byte(origin + "\n9\n"))))
	f.Fuzz(func(t *testing.T, raw []byte) {
		cp, _, err := tlog.OpenCheckpoint(raw, &l, []tlog.Witness{witness.Info()})
		if err == nil && (cp.Size != 9 || cp.Root != w.log.Root(9)) {
			t.Fatalf("forged: %q", raw)
		}
		tlog.UnverifiedOrigin(raw)
	})
}
