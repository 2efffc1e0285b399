package store

import (
	"cmp"
	"context"
	"database/sql"
	"slices"
	"strings"
	"time"
)

// Agent returns one attested agent, or ErrNotFound.
func (s *Store) Agent(id string) (a *Agent, err error) {
	err = s.read(func(m *memory) { a = m.agents[id] })
	if err == nil && a == nil {
		err = ErrNotFound
	}
	return a, err
}

// Agents returns every agent, sorted by ID.
func (s *Store) Agents() (list []*Agent, err error) {
	err = s.read(func(m *memory) {
		list = make([]*Agent, 0, len(m.agents))
		for _, a := range m.agents {
			list = append(list, a)
		}
	})
	slices.SortFunc(list, func(a, b *Agent) int { return cmp.Compare(a.ID, b.ID) })
	return list, err
}

// Banned reports whether agent id is banned.
func (s *Store) Banned(id string) (banned bool, err error) {
	err = s.read(func(m *memory) { a := m.agents[id]; banned = a != nil && a.Banned })
	return banned, err
}

// PutAttestedAgent records the outcome of a node attestation, replacing what
// was known of the agent. A banned agent stays banned: ErrBanned.
func (s *Store) PutAttestedAgent(ctx context.Context, a Agent, detail string) (*Agent, error) {
	a.Selectors = SortSelectors(a.Selectors)
	a.Banned, a.NewSerial, a.NewExpiresAt = false, "", time.Time{}
	// All that it decides by memory is the ban, and bans do not join.
	var put *Agent
	err := s.join(ctx, func(ctx context.Context, tx *sql.Tx) (apply func(*memory), err error) {
		put, apply, err = s.putAgentIn(ctx, tx, a.ID, "attested", detail, func(_ *sql.Tx, old *Agent) (*Agent, error) {
			// Looked at inside the transaction: a ban that was acknowledged while
			// the attestation ran must hold.
			if old != nil && old.Banned {
				return nil, ErrBanned
			}
			return &a, nil
		})
		return apply, err
	})
	if err != nil {
		return nil, err
	}
	return put, nil
}

// SetNewSerial records that the agent whose serial is current was given a new
// SVID, which its first use activates.
func (s *Store) SetNewSerial(ctx context.Context, id, current, serial string, expires time.Time) (*Agent, error) {
	return s.putAgent(ctx, id, "renewed", serial, func(old *Agent) (*Agent, error) {
		switch {
		case old == nil:
			return nil, ErrNotFound
		case old.Banned:
			return nil, ErrBanned
		case old.Serial != current:
			return nil, ErrConflict
		}
		a := *old
		a.NewSerial, a.NewExpiresAt = serial, expires
		return &a, nil
	})
}

// ActivateNewSerial makes the renewed SVID the only one in use.
func (s *Store) ActivateNewSerial(ctx context.Context, id, serial string) (*Agent, error) {
	return s.putAgent(ctx, id, "", "", func(old *Agent) (*Agent, error) {
		switch {
		case old == nil:
			return nil, ErrNotFound
		case old.Banned:
			return nil, ErrBanned
		case old.Serial == serial: // another call was first
			return old, nil
		case old.NewSerial != serial || serial == "":
			return nil, ErrConflict
		}
		a := *old
		a.Serial, a.ExpiresAt = old.NewSerial, old.NewExpiresAt
		a.NewSerial, a.NewExpiresAt = "", time.Time{}
		a.KeyBound = false // no quote has covered the renewed key
		return &a, nil
	})
}

// BanAgent keeps the agent out until DeleteAgent lifts the ban. Its record
// stays, its serials go. An agent that was deleted is given a bare record: it
// is the one that an operator most wants to keep out.
func (s *Store) BanAgent(ctx context.Context, id string) error {
	_, err := s.putAgentTx(ctx, id, "banned", "", func(tx *sql.Tx, old *Agent) (*Agent, error) {
		if old == nil {
			var n int
			err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM agent_history WHERE agent_id = ? AND event = 'attested'`, id).Scan(&n)
			if err == nil && n == 0 {
				err = ErrNotFound
			}
			return &Agent{ID: id, AttestationType: typeOf(id), Banned: true}, err
		}
		a := *old
		a.Banned = true
		a.Serial, a.NewSerial = "", ""
		return &a, nil
	})
	return err
}

// typeOf is the attestation type that an agent's ID names:
// spiffe://<trust domain>/spire/agent/<type>/<name>.
func typeOf(id string) string {
	_, rest, _ := strings.Cut(id, "/spire/agent/")
	typ, _, _ := strings.Cut(rest, "/")
	return typ
}

// DeleteAgent forgets the agent, which may attest again at once, and lifts a
// ban.
func (s *Store) DeleteAgent(ctx context.Context, id string) error {
	return s.deleteAgent(ctx, id, "deleted", "", func(*Agent) error { return nil })
}

// EvictAgent forgets the agent if its SVID is still the one with this serial,
// else ErrConflict. A ban it does not lift: ErrBanned.
func (s *Store) EvictAgent(ctx context.Context, id, serial, event, detail string) error {
	return s.deleteAgent(ctx, id, event, detail, func(a *Agent) error {
		switch {
		case a.Banned:
			return ErrBanned
		case a.Serial != serial:
			return ErrConflict
		}
		return nil
	})
}

func (s *Store) deleteAgent(ctx context.Context, id, event, detail string, may func(*Agent) error) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		a := s.mem.agents[id] // only writers change memory, and we are the writer
		if a == nil {
			return nil, ErrNotFound
		}
		if err := may(a); err != nil {
			return nil, err
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM agents WHERE id = ?`, id); err != nil {
			return nil, err
		}
		if err := s.addHistory(ctx, tx, id, event, detail); err != nil {
			return nil, err
		}
		return func(m *memory) { delete(m.agents, id) }, nil
	})
}

// AddAgentEvent appends a line to an agent's history.
func (s *Store) AddAgentEvent(ctx context.Context, id, event, detail string) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		return nil, s.addHistory(ctx, tx, id, event, detail)
	})
}

// AgentHistory returns the newest limit events of an agent, newest first.
func (s *Store) AgentHistory(ctx context.Context, id string, limit int) (list []AgentEvent, err error) {
	err = s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		return nil, each(ctx, tx, `SELECT at, event, detail FROM agent_history WHERE agent_id = ? ORDER BY seq DESC LIMIT ?`,
			func(rows *sql.Rows) error {
				e := AgentEvent{AgentID: id}
				var at int64
				if err := rows.Scan(&at, &e.Event, &e.Detail); err != nil {
					return err
				}
				e.At = fromMillis(at)
				list = append(list, e)
				return nil
			}, id, limit)
	})
	return list, err
}

// AttestedAgentIDs returns the IDs of all agents that ever attested, also of
// those that were deleted since, sorted.
func (s *Store) AttestedAgentIDs(ctx context.Context) (ids []string, err error) {
	err = s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		return nil, each(ctx, tx, `SELECT DISTINCT agent_id FROM agent_history WHERE event = 'attested' ORDER BY agent_id`,
			func(rows *sql.Rows) error {
				var id string
				if err := rows.Scan(&id); err != nil {
					return err
				}
				ids = append(ids, id)
				return nil
			})
	})
	return ids, err
}

// putAgent replaces the row of agent id by what f makes of the present one,
// nil when there is none, and notes event unless that is empty.
func (s *Store) putAgent(ctx context.Context, id, event, detail string, f func(old *Agent) (*Agent, error)) (*Agent, error) {
	return s.putAgentTx(ctx, id, event, detail, func(_ *sql.Tx, old *Agent) (*Agent, error) { return f(old) })
}

// putAgentTx is putAgent for an f that has to look at other tables.
func (s *Store) putAgentTx(ctx context.Context, id, event, detail string, f func(tx *sql.Tx, old *Agent) (*Agent, error)) (*Agent, error) {
	var a *Agent
	err := s.write(ctx, func(tx *sql.Tx) (apply func(*memory), err error) {
		a, apply, err = s.putAgentIn(ctx, tx, id, event, detail, f)
		return apply, err
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// putAgentIn is putAgentTx within a transaction.
func (s *Store) putAgentIn(ctx context.Context, tx *sql.Tx, id, event, detail string, f func(tx *sql.Tx, old *Agent) (*Agent, error)) (*Agent, func(*memory), error) {
	old := s.mem.agents[id] // only writers change memory, and we are the writer
	a, err := f(tx, old)
	if err != nil || a == old {
		return a, nil, err
	}
	if err := replaceAgent(ctx, tx, a); err != nil {
		return nil, nil, err
	}
	if event != "" {
		if err := s.addHistory(ctx, tx, id, event, detail); err != nil {
			return nil, nil, err
		}
	}
	return a, func(m *memory) { m.agents[id] = a }, nil
}

func (s *Store) addHistory(ctx context.Context, tx *sql.Tx, id, event, detail string) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO agent_history (agent_id, at, event, detail) VALUES (?,?,?,?)`,
		id, toMillis(s.now()), event, detail)
	return err
}

func replaceAgent(ctx context.Context, tx *sql.Tx, a *Agent) error {
	sel, err := toJSON(a.Selectors)
	if err != nil {
		return err
	}
	var att any
	if a.Attestation != nil {
		if att, err = toJSON(a.Attestation); err != nil {
			return err
		}
	}
	_, err = tx.ExecContext(ctx, `INSERT OR REPLACE INTO agents VALUES (?,?,?,?,?,?,?,?,?,?,?)`,
		a.ID, a.AttestationType, a.Serial, toMillis(a.ExpiresAt), a.NewSerial, toMillis(a.NewExpiresAt),
		a.Banned, a.CanReattest, a.KeyBound, sel, att)
	return err
}

func loadAgents(ctx context.Context, tx *sql.Tx, m *memory) error {
	return each(ctx, tx, `SELECT id, attestation_type, serial, expires_at, new_serial, new_expires_at, banned,
		can_reattest, key_bound, selectors, attestation FROM agents`,
		func(rows *sql.Rows) error {
			var a Agent
			var expires, newExpires int64
			var sel string
			var att sql.NullString
			if err := rows.Scan(&a.ID, &a.AttestationType, &a.Serial, &expires, &a.NewSerial, &newExpires, &a.Banned,
				&a.CanReattest, &a.KeyBound, &sel, &att); err != nil {
				return err
			}
			a.ExpiresAt, a.NewExpiresAt = fromMillis(expires), fromMillis(newExpires)
			if err := fromJSON(sel, &a.Selectors); err != nil {
				return err
			}
			if att.Valid {
				a.Attestation = new(Attestation)
				if err := fromJSON(att.String, a.Attestation); err != nil {
					return err
				}
			}
			m.agents[a.ID] = &a
			return nil
		})
}
