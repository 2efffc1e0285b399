package store

import (
	"context"
	"database/sql"
	"fmt"
)

// migrations are applied in order, each in its own transaction, and never
// edited once released: a later version appends.
var migrations = []string{
	`
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('bundle_sequence', 0), ('trust_serial', 0);

CREATE TABLE entries (
	id             TEXT PRIMARY KEY,
	spiffe_id      TEXT NOT NULL,
	parent_id      TEXT NOT NULL,
	selectors      TEXT NOT NULL, -- sorted, as JSON: equal sets are equal text
	x509_ttl       INTEGER NOT NULL,
	jwt_ttl        INTEGER NOT NULL,
	federates_with TEXT NOT NULL,
	admin          INTEGER NOT NULL,
	downstream     INTEGER NOT NULL,
	store_svid     INTEGER NOT NULL,
	expires_at     INTEGER NOT NULL,
	dns_names      TEXT NOT NULL,
	hint           TEXT NOT NULL,
	revision       INTEGER NOT NULL,
	created_at     INTEGER NOT NULL,
	UNIQUE (spiffe_id, parent_id, selectors)
) WITHOUT ROWID;

CREATE TABLE agents (
	id               TEXT PRIMARY KEY,
	attestation_type TEXT NOT NULL,
	serial           TEXT NOT NULL,
	expires_at       INTEGER NOT NULL,
	new_serial       TEXT NOT NULL,
	new_expires_at   INTEGER NOT NULL,
	banned           INTEGER NOT NULL,
	can_reattest     INTEGER NOT NULL,
	key_bound        INTEGER NOT NULL,
	selectors        TEXT NOT NULL,
	attestation      TEXT
) WITHOUT ROWID;

CREATE TABLE agent_history (
	seq      INTEGER PRIMARY KEY AUTOINCREMENT,
	agent_id TEXT NOT NULL,
	at       INTEGER NOT NULL,
	event    TEXT NOT NULL,
	detail   TEXT NOT NULL
);
CREATE INDEX agent_history_by_agent ON agent_history (agent_id, seq);

CREATE TABLE authorities (
	id           TEXT PRIMARY KEY,
	certificate  BLOB NOT NULL,
	key_file     TEXT NOT NULL,
	state        TEXT NOT NULL CHECK (state IN ('prepared', 'active', 'retired')),
	prepared_at  INTEGER NOT NULL,
	activated_at INTEGER NOT NULL,
	retired_at   INTEGER NOT NULL
);
CREATE UNIQUE INDEX one_active_authority ON authorities (state) WHERE state = 'active';

CREATE TABLE pcr_policies (
	name       TEXT NOT NULL,
	revision   INTEGER NOT NULL,
	policy     TEXT NOT NULL,
	digest     BLOB NOT NULL,
	created_at INTEGER NOT NULL,
	deleted_at INTEGER NOT NULL,
	PRIMARY KEY (name, revision)
) WITHOUT ROWID;

CREATE TABLE ak_pins (
	ek_hash   BLOB PRIMARY KEY,
	ak_name   BLOB NOT NULL,
	pinned_at INTEGER NOT NULL
) WITHOUT ROWID;

-- One TPM under two endorsement keys is one node: the name of the AK's parent
-- is a function of the TPM's endorsement seed.
CREATE TABLE tpm_pins (
	parent_name BLOB PRIMARY KEY,
	ek_hash     BLOB NOT NULL,
	pinned_at   INTEGER NOT NULL
) WITHOUT ROWID;
`,
	`
-- What the transparency log must hold. body: the log entry, until it is published.
CREATE TABLE certificates (
	digest    BLOB PRIMARY KEY,
	kind      TEXT NOT NULL,
	subject   TEXT NOT NULL,
	issued_at INTEGER NOT NULL,
	body      BLOB
) WITHOUT ROWID;
CREATE INDEX certificates_not_published ON certificates (digest) WHERE body IS NOT NULL;
`,
	`
CREATE TABLE trust (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID; -- of trust.json exports`,
	`
CREATE TABLE federated_bundles (trust_domain TEXT PRIMARY KEY, bundle TEXT NOT NULL) WITHOUT ROWID; -- as JSON
-- When an operator distrusted an authority (0: not), and when it left the bundle.
ALTER TABLE authorities ADD COLUMN tainted_at INTEGER NOT NULL DEFAULT 0;
ALTER TABLE authorities ADD COLUMN revoked_at INTEGER NOT NULL DEFAULT 0;
`,
	`
CREATE TABLE jwt_authorities (
	id           TEXT PRIMARY KEY,
	public_key   BLOB NOT NULL,
	key_file     TEXT NOT NULL,
	not_before   INTEGER NOT NULL,
	not_after    INTEGER NOT NULL,
	state        TEXT NOT NULL CHECK (state IN ('prepared', 'active', 'retired')),
	prepared_at  INTEGER NOT NULL,
	activated_at INTEGER NOT NULL,
	retired_at   INTEGER NOT NULL
);
CREATE UNIQUE INDEX one_active_jwt_authority ON jwt_authorities (state) WHERE state = 'active';`,
	`
ALTER TABLE jwt_authorities ADD COLUMN tainted_at INTEGER NOT NULL DEFAULT 0; -- as of authorities`,
}

// certificatesVersion is the schema that has the table certificates.
const certificatesVersion = 2

func (s *Store) migrate(ctx context.Context) error {
	if _, err := s.db.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS migrations (
		version INTEGER PRIMARY KEY, applied_at INTEGER NOT NULL)`); err != nil {
		return fmt.Errorf("store: open: %w", err)
	}
	var have int
	if err := s.db.QueryRowContext(ctx, `SELECT COALESCE(MAX(version), 0) FROM migrations`).Scan(&have); err != nil {
		return fmt.Errorf("store: open: %w", err)
	}
	if have > len(migrations) {
		return fmt.Errorf("%w: it has schema %d, this one knows %d", ErrNewerSchema, have, len(migrations))
	}
	for v := have; v < len(migrations); v++ {
		if err := s.migrateOne(ctx, v); err != nil {
			return fmt.Errorf("store: migration %d: %w", v+1, err)
		}
	}
	return nil
}

func (s *Store) migrateOne(ctx context.Context, v int) error {
	tx, err := s.db.BeginTx(ctx, &sql.TxOptions{})
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, migrations[v]); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO migrations VALUES (?, ?)`, v+1, s.now().Unix()); err != nil {
		return err
	}
	return tx.Commit()
}
