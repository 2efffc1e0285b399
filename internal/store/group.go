package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// part is one caller's share of a transaction.
type part struct {
	ctx  context.Context
	f    func(ctx context.Context, tx *sql.Tx) (apply func(*memory), err error)
	err  error         // set before done is closed
	done chan struct{} // closed when the outcome is known
}

var errPart = errors.New("store: a write of the same group ended all")

// join is write in one transaction with all who join while another write is
// under way, so that they wait for the disk together: a fleet that attests at
// once would otherwise wait for three syncs of it for every node, one after the
// other. f's own error takes f's changes back, and nobody else's.
//
// Memory changes after the commit, so f does not see in memory what others of its
// group do, and sees it in tx only. Only what decides nothing by memory that
// another join changes may join.
func (s *Store) join(ctx context.Context, f func(ctx context.Context, tx *sql.Tx) (apply func(*memory), err error)) error {
	p := &part{ctx, f, errPart, make(chan struct{})}
	s.joining.Lock()
	s.joined = append(s.joined, p)
	first := len(s.joined) == 1
	s.joining.Unlock()
	if first {
		s.writeGroup()
	}
	<-p.done
	return p.err
}

// writeGroup writes for all who have joined by the time that it is its turn.
func (s *Store) writeGroup() {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.joining.Lock()
	parts := s.joined
	s.joined = nil
	s.joining.Unlock()
	// Also after a panic: nobody waits for ever, or takes it for success.
	defer func() {
		for _, p := range parts {
			close(p.done)
		}
	}()
	var begun []*part
	for _, p := range parts {
		if p.err = p.ctx.Err(); p.err == nil {
			p.err = errPart
			begun = append(begun, p)
		}
	}
	if len(begun) == 0 {
		return
	}
	// No caller's context: one that hangs up must not take the others along.
	own := make([]error, len(begun))
	err := s.transact(context.WithoutCancel(begun[0].ctx), func(tx *sql.Tx) (func(*memory), error) {
		var applies []func(*memory)
		for i, p := range begun {
			apply, err := p.within(tx, &own[i])
			if err != nil {
				return nil, err
			}
			if apply != nil {
				applies = append(applies, apply)
			}
		}
		return func(m *memory) {
			for _, apply := range applies {
				apply(m)
			}
		}, nil
	})
	for i, p := range begun {
		if p.err = own[i]; p.err == nil {
			p.err = err
		}
	}
}

// within runs p inside a savepoint. Its own error goes to own; what is returned
// ends the whole transaction.
func (p *part) within(tx *sql.Tx, own *error) (apply func(*memory), err error) {
	ctx := context.WithoutCancel(p.ctx)
	do := func(stmt string) {
		if err == nil {
			if _, err = tx.ExecContext(ctx, stmt); err != nil {
				err = fmt.Errorf("store: %s: %w", stmt, err)
			}
		}
	}
	do(`SAVEPOINT part`)
	if err != nil {
		return nil, err
	}
	if apply, *own = p.f(ctx, tx); *own != nil {
		apply = nil
		do(`ROLLBACK TO part`)
	}
	do(`RELEASE part`)
	return apply, err
}
