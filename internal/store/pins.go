package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
)

// PinAK pins the first AK of an EK and returns the pinned name, which is akName
// unless another AK was first. With replace the pin moves to akName; what is
// returned is then the name that was pinned before.
func (s *Store) PinAK(ctx context.Context, ek [32]byte, akName []byte, replace bool) (pinned []byte, err error) {
	err = s.join(ctx, func(ctx context.Context, tx *sql.Tx) (func(*memory), error) {
		err := tx.QueryRowContext(ctx, `SELECT ak_name FROM ak_pins WHERE ek_hash = ?`, ek[:]).Scan(&pinned)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			pinned = bytes.Clone(akName)
		case err != nil:
			return nil, err
		case !replace || bytes.Equal(pinned, akName):
			return nil, nil
		}
		_, err = tx.ExecContext(ctx, `INSERT OR REPLACE INTO ak_pins VALUES (?,?,?)`, ek[:], akName, toMillis(s.now()))
		return nil, err
	})
	if err != nil {
		return nil, err
	}
	return pinned, nil
}

// PinTPM pins the first EK of a TPM, which the name of its storage key
// identifies, and returns the pinned one: ek unless another was first.
func (s *Store) PinTPM(ctx context.Context, parentName []byte, ek [32]byte) (pinned [32]byte, err error) {
	err = s.join(ctx, func(ctx context.Context, tx *sql.Tx) (func(*memory), error) {
		var was []byte
		err := tx.QueryRowContext(ctx, `SELECT ek_hash FROM tpm_pins WHERE parent_name = ?`, parentName).Scan(&was)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			pinned = ek
			_, err = tx.ExecContext(ctx, `INSERT INTO tpm_pins VALUES (?,?,?)`, parentName, ek[:], toMillis(s.now()))
			return nil, err
		case err != nil:
			return nil, err
		}
		if copy(pinned[:], was) != len(pinned) {
			return nil, errors.New("store: malformed TPM pin")
		}
		return nil, nil
	})
	if err != nil {
		return [32]byte{}, err
	}
	return pinned, nil
}
