// Package store keeps what the server must not forget, in one SQLite file.
//
// One process owns the file (the caller holds the lock of the data directory),
// so entries, agents, authorities and current PCR policies are also held in
// memory and read from there; a write reaches memory only after its commit is
// on disk, and nothing is acknowledged before that.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"modernc.org/sqlite" // also the driver "sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// Store is safe for concurrent use.
type Store struct {
	db   *sql.DB
	path string
	now  func() time.Time

	// writing serialises writers, so that memory changes in commit order.
	writing sync.Mutex

	mu     sync.RWMutex // guards what follows; held for memory work only
	mem    *memory
	broken error // set when a commit failed and memory may differ from disk
	closed bool

	joining sync.Mutex
	joined  []*part // guarded by joining; wait for the next group

	// sorted is what Entries returned last.
	sorted atomic.Pointer[sortedEntries]

	// failCommit lets a test make a commit fail before or after it persisted.
	failCommit func(commit func() error) error
}

// Open opens or makes the database at path and brings its schema up to date.
func Open(ctx context.Context, path string, now func() time.Time) (*Store, error) {
	if now == nil {
		now = time.Now
	}
	// Made here because SQLite would make it with the umask's mode; its -wal
	// and -shm files copy the mode of the database.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	f.Close()
	if err != nil {
		return nil, err
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("store: %s has mode %04o: other users must not read it", path, fi.Mode().Perm())
	}
	q := url.Values{}
	for _, p := range []string{
		"busy_timeout(5000)", // ms; an operator's sqlite3 shell may hold the lock
		"journal_mode(WAL)",
		"synchronous(FULL)", // a commit is on disk when it returns
		"foreign_keys(ON)",
	} {
		q.Add("_pragma", p)
	}
	q.Set("_txlock", "immediate")
	u := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: q.Encode()}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	s := &Store{db: db, path: path, now: now}
	if err := s.migrate(ctx); err != nil {
		db.Close()
		return nil, s.diskFull(err)
	}
	if s.mem, err = s.load(ctx); err != nil {
		db.Close()
		return nil, s.diskFull(err)
	}
	return s, nil
}

// Close closes the database.
func (s *Store) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	return s.db.Close()
}

// Check reports whether the store can be read and written; health checks use it.
func (s *Store) Check(ctx context.Context) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		_, err := tx.ExecContext(ctx, `UPDATE meta SET value = value WHERE key = 'bundle_sequence'`)
		return nil, err
	})
}

// write runs f in one transaction and, once that is durable, applies f's
// change to memory. f's own errors pass through unchanged.
func (s *Store) write(ctx context.Context, f func(tx *sql.Tx) (apply func(*memory), err error)) (err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	// A caller that goes away ends what has not begun; a commit that has begun
	// is seen through, so that its outcome is known.
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.transact(ctx, f)
}

// transact is write for a caller that holds s.writing.
func (s *Store) transact(ctx context.Context, f func(tx *sql.Tx) (apply func(*memory), err error)) (err error) {
	defer func() { err = s.diskFull(err) }()
	if err := s.mend(ctx); err != nil {
		return err
	}
	tx, err := s.db.BeginTx(context.WithoutCancel(ctx), nil)
	if err != nil {
		return fmt.Errorf("store: begin: %w", err)
	}
	defer tx.Rollback() // after a commit it does nothing
	apply, err := f(tx)
	if err != nil {
		return err
	}
	commit := tx.Commit
	if s.failCommit != nil {
		commit = func() error { return s.failCommit(tx.Commit) }
	}
	if err := commit(); err != nil {
		// It may have persisted and failed afterwards. Memory is right again
		// only after it was read back.
		tx.Rollback()
		s.mu.Lock()
		s.broken = err
		s.mu.Unlock()
		if merr := s.mend(context.WithoutCancel(ctx)); merr != nil {
			return errors.Join(fmt.Errorf("store: commit: %w", err), merr)
		}
		return fmt.Errorf("store: commit: %w", err)
	}
	if apply != nil {
		s.mu.Lock()
		apply(s.mem)
		s.mu.Unlock()
	}
	return nil
}

// mend reads everything back after a commit whose outcome is unknown. The
// caller holds s.writing.
func (s *Store) mend(ctx context.Context) error {
	s.mu.RLock()
	broken, closed := s.broken, s.closed
	s.mu.RUnlock()
	if closed {
		return ErrClosed
	}
	if broken == nil {
		return nil
	}
	m, err := s.load(ctx)
	if err != nil {
		return fmt.Errorf("%w (%v): %w", ErrUnknownState, broken, err)
	}
	s.mu.Lock()
	m.generation = s.mem.generation + 1
	s.mem, s.broken = m, nil
	s.mu.Unlock()
	return nil
}

// read gives f the memory. It fails while the outcome of a write is unknown.
func (s *Store) read(f func(*memory)) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch {
	case s.closed:
		return ErrClosed
	case s.broken != nil:
		return fmt.Errorf("%w: %w", ErrUnknownState, s.broken)
	}
	f(s.mem)
	return nil
}

// diskFull adds syscall.ENOSPC to what SQLite calls full, or an I/O error while
// no block is free, so that callers can say what to do.
func (s *Store) diskFull(err error) error {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return err
	}
	const primary = 0xff // the rest of a code says more about its kind
	switch e.Code() & primary {
	case sqlite3.SQLITE_FULL:
	case sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN:
		var fs syscall.Statfs_t
		if syscall.Statfs(s.path, &fs) != nil || fs.Bavail > 0 {
			return err
		}
	default:
		return err
	}
	return fmt.Errorf("%w: %w", err, syscall.ENOSPC)
}
