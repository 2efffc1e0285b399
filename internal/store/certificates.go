package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"time"
)

// CertificateKind says what a certificate that the server issued is for.
type CertificateKind string

// What goes into the transparency log.
const (
	CertAuthority     CertificateKind = "svid_authority"
	CertAttestationCA CertificateKind = "attestation_ca"
	CertAK            CertificateKind = "ak"
)

// IssuedCertificate is the record of a certificate that the log must hold. It
// is durable before the certificate is logged, and that before it is handed
// out, so the log and these records can be held against each other.
type IssuedCertificate struct {
	Digest   [32]byte // SHA-256 of its DER
	Kind     CertificateKind
	Subject  string // an authority's ID, a node's agent ID
	IssuedAt time.Time
	// Body is the log entry, kept until a published checkpoint covers it.
	Body []byte
}

// AddCertificates records certificates. Those that are recorded stay as they are.
func (s *Store) AddCertificates(ctx context.Context, list []IssuedCertificate) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		for _, c := range list {
			if _, err := tx.ExecContext(ctx, `INSERT OR IGNORE INTO certificates VALUES (?,?,?,?,?)`,
				c.Digest[:], string(c.Kind), c.Subject, toMillis(c.IssuedAt), c.Body); err != nil {
				return nil, err
			}
		}
		return nil, nil
	})
}

// CertificatesPublished forgets the log entries of certificates whose proof can
// be had.
func (s *Store) CertificatesPublished(ctx context.Context, digests [][32]byte) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		for _, d := range digests {
			if _, err := tx.ExecContext(ctx, `UPDATE certificates SET body = NULL WHERE digest = ?`, d[:]); err != nil {
				return nil, err
			}
		}
		return nil, nil
	})
}

// PendingCertificates returns those that may not be in a published checkpoint.
func (s *Store) PendingCertificates(ctx context.Context) ([]IssuedCertificate, error) {
	return queryCertificates(ctx, s.db, `WHERE body IS NOT NULL`)
}

// ReadCertificates returns all records of the database at path, which a server
// may have open. It writes nothing.
func ReadCertificates(ctx context.Context, path string) ([]IssuedCertificate, error) {
	// SQLite's own message for a file that is not there names neither.
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	q := url.Values{"mode": {"ro"}, "_pragma": {"busy_timeout(5000)"}}
	u := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: q.Encode()}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return nil, err
	}
	defer db.Close()
	var version int
	if err := db.QueryRowContext(ctx, `SELECT COALESCE(MAX(version), 0) FROM migrations`).Scan(&version); err != nil {
		return nil, fmt.Errorf("store: %s: %w", path, err)
	}
	if version < certificatesVersion {
		return nil, fmt.Errorf("store: %s was last written before certificates were logged: %w", path, fs.ErrNotExist)
	}
	return queryCertificates(ctx, db, "")
}

func queryCertificates(ctx context.Context, db *sql.DB, where string) (list []IssuedCertificate, err error) {
	rows, err := db.QueryContext(ctx, `SELECT digest, kind, subject, issued_at, body FROM certificates `+where+` ORDER BY issued_at, digest`)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var c IssuedCertificate
		var digest []byte
		var ms int64
		if err := rows.Scan(&digest, &c.Kind, &c.Subject, &ms, &c.Body); err != nil {
			return nil, err
		}
		if copy(c.Digest[:], digest) != len(c.Digest) {
			return nil, errors.New("store: malformed certificate record")
		}
		c.IssuedAt = fromMillis(ms)
		list = append(list, c)
	}
	return list, rows.Err()
}
