package tlog

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/client"
	_ "modernc.org/sqlite" // the driver "sqlite"

	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// index finds entries by what they are about. It is made from the log and can
// be made again, so it need not be durable: after a crash it is behind, and
// follow brings it up to the tree.
type index struct{ db *sql.DB }

const (
	kindLeaf        = 0 // key is the leaf hash
	kindCertificate = 1 // key is the digest of a certificate
)

func openIndex(ctx context.Context, path string, logID []byte) (*index, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) // SQLite would use the umask's mode
	if err != nil {
		return nil, err
	}
	f.Close()
	q := url.Values{}
	for _, p := range []string{"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(NORMAL)"} {
		q.Add("_pragma", p)
	}
	u := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: q.Encode()}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	x := &index{db}
	if err := x.prepare(ctx, logID); err != nil {
		db.Close()
		return nil, fmt.Errorf("index %s: %w", path, err)
	}
	return x, nil
}

func (x *index) prepare(ctx context.Context, logID []byte) error {
	if _, err := x.db.ExecContext(ctx, `
CREATE TABLE IF NOT EXISTS log (id BLOB NOT NULL, next INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS entries (kind INTEGER NOT NULL, key BLOB NOT NULL, idx INTEGER NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID;
`); err != nil {
		return err
	}
	var id []byte
	err := x.db.QueryRowContext(ctx, `SELECT id FROM log`).Scan(&id)
	if err == nil && bytes.Equal(id, logID) {
		return nil
	}
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	// New, or of a log that was here before.
	_, err = x.db.ExecContext(ctx, `DELETE FROM log; DELETE FROM entries; INSERT INTO log VALUES (?, 0)`, logID)
	return err
}

func (x *index) close() error { return x.db.Close() }

// next is the first index that is not in here.
func (x *index) next(ctx context.Context) (n uint64, err error) {
	err = x.db.QueryRowContext(ctx, `SELECT next FROM log`).Scan(&n)
	return n, err
}

func (x *index) leaf(h [32]byte) (uint64, bool, error)        { return x.find(kindLeaf, h) }
func (x *index) certificate(d [32]byte) (uint64, bool, error) { return x.find(kindCertificate, d) }

func (x *index) find(kind int, key [32]byte) (idx uint64, ok bool, err error) {
	err = x.db.QueryRow(`SELECT idx FROM entries WHERE kind = ? AND key = ?`, kind, key[:]).Scan(&idx)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, nil
	}
	return idx, err == nil, err
}

// row is one entry for the index.
type row struct {
	leaf   [32]byte
	digest [32]byte
	cert   bool
}

func rowOf(body []byte) row {
	r := row{leaf: [32]byte(rfc6962.DefaultHasher.HashLeaf(body))}
	// A log may hold what an older or later version wrote: indexed by its hash.
	if e, err := pub.ParseBody(body); err == nil {
		r.digest, r.cert = e.Digest, e.Certificate.IsCA
	}
	return r
}

// add puts rows in whose first has index from. The first entry of a key stays.
func (x *index) add(ctx context.Context, from uint64, rows []row) error {
	tx, err := x.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // after a commit it does nothing
	insert, err := tx.PrepareContext(ctx, `INSERT OR IGNORE INTO entries VALUES (?, ?, ?)`)
	if err != nil {
		return err
	}
	defer insert.Close()
	for i, r := range rows {
		if _, err := insert.ExecContext(ctx, kindLeaf, r.leaf[:], from+uint64(i)); err != nil {
			return err
		}
		if r.cert {
			if _, err := insert.ExecContext(ctx, kindCertificate, r.digest[:], from+uint64(i)); err != nil {
				return err
			}
		}
	}
	if _, err := tx.ExecContext(ctx, `UPDATE log SET next = ?`, from+uint64(len(rows))); err != nil {
		return err
	}
	return tx.Commit()
}

// follow brings the index up to the tree.
func (l *Log) follow(ctx context.Context) error {
	for {
		next, err := l.index.next(ctx)
		if err != nil {
			return err
		}
		size, err := l.reader.IntegratedSize(ctx)
		if err != nil {
			return err
		}
		if next > size {
			return fmt.Errorf("%w: it has %d entries and had %d", ErrLost, size, next)
		}
		if next == size {
			return nil
		}
		bundle, err := client.GetEntryBundle(ctx, l.reader.ReadEntryBundle, next/bundleWidth, size)
		if err != nil {
			return err
		}
		from := next % bundleWidth
		upto := min(bundleWidth, size-next+from)
		if uint64(len(bundle.Entries)) < upto {
			return fmt.Errorf("%w: entry %d is missing", ErrLost, next/bundleWidth*bundleWidth+uint64(len(bundle.Entries)))
		}
		var rows []row
		for _, body := range bundle.Entries[from:upto] {
			rows = append(rows, rowOf(body))
		}
		if err := l.index.add(ctx, next, rows); err != nil {
			return err
		}
		l.mu.Lock()
		for _, r := range rows {
			// One that has not resolved yet stays for those who wait; the next
			// look finds it in the index.
			delete(l.flying, r.leaf)
		}
		l.mu.Unlock()
	}
}

const followInterval = 200 * time.Millisecond

func (l *Log) followUntil(ctx context.Context) {
	t := time.NewTicker(followInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := l.follow(ctx); err != nil && ctx.Err() == nil {
				l.log.Error("transparency log: index", "error", err)
			}
		}
	}
}
