package tlog

import (
	"errors"
	"fmt"
)

// Outcomes that a caller branches on. Every failure of this package is one of
// them (errors.Is).
var (
	// ErrMalformed: input that is not what it claims to be in form.
	ErrMalformed = errors.New("malformed log entry")
	// ErrUnknownLog: an entry of a log that the caller does not know.
	ErrUnknownLog = errors.New("unknown log")
	// ErrOtherEntry: the entry is about something else than was asked.
	ErrOtherEntry = errors.New("log entry for something else")
	// ErrNotIncluded: the Merkle proof does not lead to the checkpoint's tree.
	ErrNotIncluded = errors.New("not included in the log's tree")
	// ErrCheckpoint: the checkpoint is not the log's.
	ErrCheckpoint = errors.New("bad log checkpoint")
	// ErrSignature: the signature inside an entry is not by its verifier.
	ErrSignature = errors.New("bad signature in log entry")
	// ErrFork: two trees of one log of which neither continues the other.
	ErrFork = errors.New("the log has forked")
	// ErrUndecided: two trees of different sizes cannot be compared without a
	// consistency proof.
	ErrUndecided = errors.New("no consistency proof")
	// ErrKey: the caller's own log or witness keys are unusable.
	ErrKey = errors.New("bad log or witness key")
	// ErrWindow: outside the validity window of a log or witness.
	ErrWindow = errors.New("outside the key's validity window")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrMalformed, fmt.Errorf(format, args...))
}
