// Package tlog keeps the trust domain's transparency log: an append-only Merkle
// tree in files (C2SP tlog-tiles), whose checkpoints an Ed25519 key signs.
//
// An entry is acknowledged only when a published checkpoint covers it, and what
// a checkpoint covers is on disk: a crash between the two leaves an entry that
// nobody was promised, never a promise without an entry.
package tlog

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"

	"github.com/rootlink/rootlink/internal/files"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// Names in a data directory.
const (
	Dir       = "log"
	KeyFile   = "log.key"
	IndexFile = "log-index.db"
	lockFile  = ".lock"
)

// From append to published checkpoint an entry waits for its batch, for the
// checkpoint before to be old enough, and for its turn at the disk.
const (
	batchAge           = 50 * time.Millisecond
	batchSize          = 256
	checkpointInterval = 100 * time.Millisecond // the least that the library takes
	pollInterval       = 10 * time.Millisecond  // while somebody waits
	maxOutstanding     = 8192                   // entries on their way
	witnessTimeout     = 5 * time.Second
	closeTimeout       = 10 * time.Second
)

// Errors that callers branch on.
var (
	// ErrBusy: more entries are on their way than the log takes at a time.
	ErrBusy = errors.New("the log is busy")
	// ErrNotLogged: no such certificate in the log.
	ErrNotLogged = errors.New("not in the log")
	// ErrLost: a part of the log is missing or is not what it was.
	ErrLost = errors.New("the log is not what it was")
	// ErrOrigin: the log exists under another origin.
	ErrOrigin = errors.New("the log has another origin")
	// ErrInUse: another process has the log.
	ErrInUse = errors.New("the log is in use by another process")
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("the log is closed")
)

// Config says where a log is.
type Config struct {
	DataDir string
	// Origin names a new log. An existing one keeps its own, and another one
	// here is an error; empty takes what there is.
	Origin string
	// WitnessPolicy, unless nil, names the witnesses whose cosignatures every
	// checkpoint needs before it is published, in tessera's form of a policy.
	WitnessPolicy []byte
	Operator      string // for those who verify
	Log           *slog.Logger
}

// Log is safe for concurrent use.
type Log struct {
	info      pub.Log
	witnesses []pub.Witness
	root      string
	log       *slog.Logger
	lock      *os.File
	index     *index
	appender  *tessera.Appender
	reader    tessera.LogReader
	shutdown  func(context.Context) error
	stop      context.CancelFunc
	following sync.WaitGroup

	mu     sync.Mutex
	flying map[[32]byte]*flight // by leaf hash: on their way, or not indexed yet
	closed bool

	published publication
	proofs    proofCache

	// beforeAnswer lets a test stop between a published entry and its answer.
	beforeAnswer func()
}

// flight is an entry that was given to the appender.
type flight struct {
	done   chan struct{}
	idx    uint64 // after done
	err    error  // after done
	digest [32]byte
	cert   bool // the entry is about a certificate
}

// Open opens the log of a data directory, and makes it in one that has none.
func Open(ctx context.Context, c Config) (_ *Log, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("transparency log: %w", err)
		}
	}()
	if c.Log == nil {
		c.Log = slog.Default()
	}
	l := &Log{root: filepath.Join(c.DataDir, Dir), log: c.Log, flying: map[[32]byte]*flight{}}
	defer func() {
		if err != nil {
			l.release()
		}
	}()
	if err := os.MkdirAll(l.root, 0o700); err != nil {
		return nil, err
	}
	if l.lock, err = files.Lock(filepath.Join(l.root, lockFile)); errors.Is(err, files.ErrLocked) {
		return nil, ErrInUse
	} else if err != nil {
		return nil, err
	}
	key, signer, err := l.openKey(c)
	if err != nil {
		return nil, err
	}
	// Sigstore's verifiers take a log's origin from the host of its URL.
	l.info.URL, l.info.Operator = "https://"+l.info.Origin, c.Operator
	l.info.ID = pub.LogID(l.info.Origin, key)

	opts := tessera.NewAppendOptions().WithCheckpointSigner(signer).WithBatching(batchSize, batchAge).
		WithCheckpointInterval(checkpointInterval).WithPushback(maxOutstanding)
	if c.WitnessPolicy != nil {
		group, err := tessera.NewWitnessGroupFromPolicy(c.WitnessPolicy)
		if err != nil {
			return nil, fmt.Errorf("witness policy: %w", err)
		}
		if l.witnesses, err = policyWitnesses(c.WitnessPolicy); err != nil {
			return nil, fmt.Errorf("witness policy: %w", err)
		}
		// Fails closed: whoever states a quorum means it. Entries are in the
		// tree meanwhile and get their proofs when the witnesses are back.
		opts = opts.WithWitnesses(group, &tessera.WitnessOptions{Timeout: witnessTimeout})
	}
	redirectKlog(c.Log)
	driver, err := posix.New(ctx, posix.Config{Path: l.root, HTTPClient: witnessClient()})
	if err != nil {
		return nil, err
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	l.stop = stop
	if l.appender, l.shutdown, l.reader, err = tessera.NewAppender(background, driver, opts); err != nil {
		return nil, err
	}
	if l.index, err = openIndex(ctx, filepath.Join(c.DataDir, IndexFile), l.info.ID); err != nil {
		return nil, err
	}
	if err := l.follow(ctx); err != nil {
		return nil, err
	}
	l.following.Go(func() { l.followUntil(background) })
	l.published.read = l.reader.ReadCheckpoint
	return l, nil
}

// openKey reads the log's key, or makes it for a log that is not there yet. A
// log without its key, or with another's, is an error: a new key would make a
// log that no verifier knows, under the old one's name.
func (l *Log) openKey(c Config) (ed25519.PublicKey, note.Signer, error) {
	signed, err := os.ReadFile(filepath.Join(l.root, "checkpoint"))
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	path := filepath.Join(c.DataDir, KeyFile)
	key, origin, err := readKey(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && exists:
		return nil, nil, fmt.Errorf("%w: its key %s is missing", ErrLost, path)
	case errors.Is(err, fs.ErrNotExist):
		if err := pub.CheckOrigin(c.Origin); err != nil {
			return nil, nil, err
		}
		if key, err = makeKey(path, c.Origin); err != nil {
			return nil, nil, err
		}
		origin = c.Origin
	case err != nil:
		return nil, nil, err
	case c.Origin != "" && c.Origin != origin:
		return nil, nil, fmt.Errorf("%w: %s, not %s", ErrOrigin, origin, c.Origin)
	}
	l.info.Origin, l.info.Key = origin, key.Public()
	if exists {
		cp, _, err := pub.OpenCheckpoint(signed, &pub.Log{Origin: origin, Key: key.Public()}, nil)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrLost, err)
		}
		l.published.set(cp.Size, signed)
	}
	signer, err := note.NewSigner(skey(origin, key))
	if err != nil {
		return nil, nil, err
	}
	return key.Public().(ed25519.PublicKey), signer, nil
}

// Info is the log as a verifier knows it.
func (l *Log) Info() pub.Log { return l.info }

// Witnesses are those of the witness policy, as a verifier knows them.
func (l *Log) Witnesses() []pub.Witness { return l.witnesses }

// Append adds an entry and returns the proof of it, or of the same entry that
// was there before. When it returns, a published checkpoint covers the entry.
func (l *Log) Append(ctx context.Context, body []byte) (*rekorv1.TransparencyLogEntry, error) {
	idx, err := l.Integrate(ctx, body)
	if err != nil {
		return nil, err
	}
	e, err := l.prove(ctx, idx, body)
	if err == nil && l.beforeAnswer != nil {
		l.beforeAnswer()
	}
	return e, err
}

// Integrate adds an entry, unless it is there, and returns its index. When it
// returns, the entry is part of the tree on disk, and of every checkpoint that
// will be published; its proof comes with the next one.
func (l *Log) Integrate(ctx context.Context, body []byte) (uint64, error) {
	entry, err := pub.ParseBody(body)
	if err != nil {
		return 0, err
	}
	leaf := [32]byte(rfc6962.DefaultHasher.HashLeaf(body))
	f, err := l.launch(leaf, entry, body)
	if err != nil {
		return 0, err
	}
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-f.done:
		return f.idx, f.err
	}
}

// holds reports whether an entry is there or on its way.
func (l *Log) holds(body []byte) bool {
	leaf := [32]byte(rfc6962.DefaultHasher.HashLeaf(body))
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok, err := l.index.leaf(leaf)
	return l.flying[leaf] != nil || err == nil && ok
}

// launch gives an entry to the appender, unless it is there or on its way.
func (l *Log) launch(leaf [32]byte, entry *pub.Entry, body []byte) (*flight, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	if f := l.flying[leaf]; f != nil {
		return f, nil
	}
	// Under the lock, so that an entry cannot leave flying for the index
	// between two looks.
	idx, ok, err := l.index.leaf(leaf)
	if err != nil {
		return nil, err
	}
	f := &flight{done: make(chan struct{}), idx: idx, digest: entry.Digest, cert: entry.Certificate.IsCA}
	if ok {
		close(f.done)
		return f, nil
	}
	if len(l.flying) >= maxOutstanding {
		return nil, ErrBusy
	}
	l.flying[leaf] = f
	// The caller's context does not reach the appender: whoever goes away must
	// not take the batch of the others along.
	future := l.appender.Add(context.Background(), tessera.NewEntry(bytes.Clone(body)))
	go func() {
		i, err := future()
		if errors.Is(err, tessera.ErrPushback) {
			err = fmt.Errorf("%w: %w", ErrBusy, err)
		}
		f.idx, f.err = i.Index, err
		if err != nil {
			l.mu.Lock()
			delete(l.flying, leaf)
			l.mu.Unlock()
		}
		close(f.done)
	}()
	return f, nil
}

// prove waits until a published checkpoint covers idx and returns the proof.
func (l *Log) prove(ctx context.Context, idx uint64, body []byte) (*rekorv1.TransparencyLogEntry, error) {
	size, signed, err := l.published.await(ctx, idx)
	if err != nil {
		return nil, err
	}
	cp, hashes, err := l.proofs.inclusion(ctx, l, idx, size, signed)
	if err != nil {
		return nil, err
	}
	e := &rekorv1.TransparencyLogEntry{
		LogIndex:          int64(idx),
		LogId:             &commonv1.LogId{KeyId: l.info.ID},
		KindVersion:       &rekorv1.KindVersion{Kind: pub.Kind, Version: pub.Version},
		CanonicalizedBody: body,
		InclusionProof: &rekorv1.InclusionProof{
			LogIndex: int64(idx), RootHash: cp.Root[:], TreeSize: int64(size), Hashes: hashes,
			Checkpoint: &rekorv1.Checkpoint{Envelope: string(signed)},
		},
	}
	// What goes out has been through the verifier: a damaged tile must show
	// here, not at the far end years later.
	if _, err := pub.Verify(e, body, []pub.Log{l.info}, nil); err != nil {
		return nil, fmt.Errorf("%w: the proof of entry %d does not verify: %w", ErrLost, idx, err)
	}
	return e, nil
}

// CertificateProof returns the proof that the certificate whose DER has this
// SHA-256 is logged.
func (l *Log) CertificateProof(ctx context.Context, digest [32]byte) (*rekorv1.TransparencyLogEntry, error) {
	idx, err := l.CertificateIndex(ctx, digest)
	if err != nil {
		return nil, err
	}
	body, err := l.Entry(ctx, idx)
	if err != nil {
		return nil, err
	}
	return l.prove(ctx, idx, body)
}

// CertificateIndex returns where the certificate whose DER has this SHA-256 is.
func (l *Log) CertificateIndex(ctx context.Context, digest [32]byte) (uint64, error) {
	var f *flight
	l.mu.Lock()
	for _, o := range l.flying {
		if o.cert && o.digest == digest {
			f = o
		}
	}
	var idx uint64
	var ok bool
	var err error
	if f == nil {
		idx, ok, err = l.index.certificate(digest)
	}
	l.mu.Unlock()
	switch {
	case f != nil:
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-f.done:
			return f.idx, f.err
		}
	case err != nil:
		return 0, err
	case !ok:
		return 0, ErrNotLogged
	}
	return idx, nil
}

// Entry returns the body at index.
func (l *Log) Entry(ctx context.Context, idx uint64) ([]byte, error) {
	size, err := l.reader.IntegratedSize(ctx)
	if err != nil {
		return nil, err
	}
	return readEntry(ctx, l.reader.ReadEntryBundle, idx, size)
}

// Checkpoint returns what was published last.
func (l *Log) Checkpoint(ctx context.Context) ([]byte, error) { return l.reader.ReadCheckpoint(ctx) }

// Close publishes what is on its way and releases everything.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := errors.Join(l.shutdown(ctx), l.follow(ctx))
	if err != nil {
		err = fmt.Errorf("transparency log: close: %w", err)
	}
	return errors.Join(err, l.release())
}

func (l *Log) release() error {
	if l.stop != nil {
		l.stop()
	}
	l.published.close()
	l.following.Wait()
	var errs []error
	if l.index != nil {
		errs = append(errs, l.index.close())
	}
	if l.lock != nil {
		errs = append(errs, l.lock.Close())
	}
	return errors.Join(errs...)
}
