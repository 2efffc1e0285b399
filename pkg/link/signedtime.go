package link

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

const (
	// maxTimeSpread is how far the attested times of one link may lie apart.
	// Recorders ask one after the other, and some are asked again later.
	maxTimeSpread = 10 * time.Minute
	// maxBeforeNonce is how far the clocks of a timestamp authority and of the
	// server that gave the nonce may disagree.
	maxBeforeNonce = 10 * time.Second
)

// Kinds of time sources.
const (
	SourceTimestamp   = "rfc3161"
	SourceCosignature = "cosignature"
)

// LinkTime is when a link was signed, and who says so.
type LinkTime struct {
	At       time.Time `json:"at"`       // T
	Attested bool      `json:"attested"` // false: T is the verifier's own clock
	// Authorities is how many distinct ones attest a time, Needed how many
	// trust.json wants.
	Authorities int          `json:"authorities"`
	Needed      int          `json:"needed"`
	Sources     []TimeSource `json:"sources"`
	Logs        []LogEntry   `json:"log_entries"`
}

// TimeSource is one token or cosignature.
type TimeSource struct {
	Kind      string    `json:"kind"`
	Authority string    `json:"authority"`
	ID        string    `json:"id,omitempty"` // what counts as one authority
	Time      time.Time `json:"time"`
	Operator  string    `json:"operator,omitempty"`
	// SameOperator: whoever runs the SVID authority runs this one too.
	SameOperator bool   `json:"same_operator_as_svid_authority,omitempty"`
	Counted      bool   `json:"counted"`
	Why          string `json:"why,omitempty"` // it is not counted
}

// LogEntry is one entry of a transparency log.
type LogEntry struct {
	Of           string `json:"of"` // one of the Logged… constants
	Log          string `json:"log"`
	Index        uint64 `json:"index"`
	Size         uint64 `json:"size,omitempty"` // of the tree in which it was found
	Operator     string `json:"operator,omitempty"`
	SameOperator bool   `json:"same_operator_as_svid_authority,omitempty"`
	Counted      bool   `json:"counted"`
	Why          string `json:"why,omitempty"`
}

// timestampTokens verifies every token. A bad one refuses the link even if
// others are good: somebody changed something.
func (v *linkVerifier) timestampTokens() (string, error) {
	for i, raw := range v.bundle.tokens {
		t, err := timestamp.Parse(raw)
		if err != nil {
			return "", fmt.Errorf("token %d: %w", i, err)
		}
		got, err := t.Verify(v.bundle.signature, v.trust.root.Timestamps)
		if errors.Is(err, timestamp.ErrUnknownAuthority) {
			v.time.Sources = append(v.time.Sources, TimeSource{
				Kind: SourceTimestamp, Authority: "not in trust.json", Time: t.UnverifiedTime().UTC(),
				Why: "its authority is not in trust.json",
			})
			continue
		}
		if err != nil {
			return "", fmt.Errorf("token %d: %w", i, err)
		}
		v.attest(TimeSource{
			Kind: SourceTimestamp, Authority: authorityName(got.Authority), ID: hexHash(got.AuthorityID),
			Time: got.Time.UTC(), Operator: got.Authority.Operator,
		})
	}
	if len(v.bundle.tokens) == 0 {
		return "the bundle has none", errSkip
	}
	return fmt.Sprintf("%s, %d by known authorities", count(len(v.bundle.tokens), "token"), len(v.times)), nil
}

func authorityName(a *timestamp.Authority) string {
	if a.URI != "" {
		return a.URI
	}
	return a.Chain[len(a.Chain)-1].Subject.String()
}

// attest adds a verified time. A second one of the same authority is kept for
// the agreement of times, and does not count: an authority is one vote.
func (v *linkVerifier) attest(s TimeSource) {
	s.Counted = true
	s.SameOperator = s.Operator == v.trust.Operator()
	if v.authorities[s.ID] {
		s.Counted, s.Why = false, "its authority is counted already"
	}
	v.authorities[s.ID] = true
	v.times = append(v.times, s.Time)
	v.time.Sources = append(v.time.Sources, s)
}

// logEntries verifies that the logs hold exactly this signature: the body is
// built anew, what the entry says of itself proves nothing.
func (v *linkVerifier) logEntries() (string, error) {
	known := 0
	for i, e := range v.bundle.entries {
		body, err := tlog.EntryBody(v.bundle.payloadDigest(), v.bundle.signature, v.leaf)
		if err != nil {
			return "", err
		}
		got, err := tlog.Verify(e, body, v.trust.root.Logs, v.trust.witnesses)
		if errors.Is(err, tlog.ErrUnknownLog) {
			v.unknownLog(LoggedSignature, e.GetLogId().GetKeyId(), e.GetLogIndex())
			continue
		}
		if err != nil {
			return "", fmt.Errorf("log entry %d: %w", i, err)
		}
		known++
		if err := v.includes(LoggedSignature, got); err != nil {
			return "", fmt.Errorf("log entry %d: %w", i, err)
		}
		for _, c := range got.Cosigned {
			v.attest(TimeSource{
				Kind: SourceCosignature, Authority: "witness " + c.Witness.Name, ID: hexHash(c.Witness.ID()),
				Time: c.Time.UTC(), Operator: c.Witness.Operator,
			})
		}
	}
	if len(v.bundle.entries) == 0 {
		return "the bundle has none", errSkip
	}
	return fmt.Sprintf("%d log entries, %d in known logs", len(v.bundle.entries), known), nil
}

func (v *linkVerifier) unknownLog(of string, id []byte, index int64) {
	v.time.Logs = append(v.time.Logs, LogEntry{
		Of: of, Log: "unknown log " + short(hex.EncodeToString(id)), Index: uint64(max(index, 0)), Why: "the log is not in trust.json",
	})
}

// includes notes an inclusion and compares its checkpoint with others of the
// same log. A log that shows different trees to different people is caught by
// whoever sees two of them.
func (v *linkVerifier) includes(of string, got *tlog.Included) error {
	v.time.Logs = append(v.time.Logs, LogEntry{
		Of: of, Log: got.Log.Origin, Index: got.Index, Size: got.Size, Operator: got.Log.Operator,
		SameOperator: got.Log.Operator == v.trust.Operator(), Counted: true,
	})
	v.included = append(v.included, got)
	return v.showTree(got)
}

// timeKnown refuses a link that relies on sources of which none is known: who
// stamped it meant the time to be attested, and it is not.
func (v *linkVerifier) timeKnown() (string, error) {
	tokens, entries := len(v.bundle.tokens), len(v.bundle.entries)
	switch {
	case tokens+entries == 0:
		return "", errSkip
	case tokens > 0 && len(v.times) == 0:
		return "", fmt.Errorf("%s, none by an authority of trust.json: %w", count(tokens, "timestamp token"), ErrNoTime)
	case len(v.times)+len(v.included) == 0:
		return "", fmt.Errorf("%d log entries, none in a log of trust.json: %w", entries, ErrNoTime)
	}
	return fmt.Sprintf("%s attested, %d log inclusions", count(len(v.times), "time"), len(v.included)), nil
}

// timeAgreement sets T. One authority that is wrong, or lies, must not pass
// among others: a set that disagrees is refused whole.
func (v *linkVerifier) timeAgreement() (string, error) {
	if len(v.times) == 0 {
		// The key of a log that was given up signs for whoever has it.
		if err := v.logsHold(v.now); err != nil {
			return "", err
		}
		// Whoever has the key of an SVID that has expired can still sign. Asked
		// for a time in the past, nobody but an authority can say that the
		// signature existed then.
		if v.now.Before(v.clock) {
			return "", fmt.Errorf("no time is attested, so nothing says that it existed at %s: %w", stamp(v.now), ErrNoTime)
		}
		return "no time is attested: judged at the verifier's own clock", errSkip
	}
	first, last := slices.MinFunc(v.times, time.Time.Compare), slices.MaxFunc(v.times, time.Time.Compare)
	if d := last.Sub(first); d > maxTimeSpread {
		return "", fmt.Errorf("the attested times disagree: %s and %s, more than %s apart", stamp(first), stamp(last), maxTimeSpread)
	}
	if last.After(v.now.Add(MaxClockSkew)) {
		return "", fmt.Errorf("the attested time is %w: %s, it is %s", ErrNotYetValid, stamp(last), stamp(v.now))
	}
	v.first, v.at = first, last
	v.time.At, v.time.Attested = last, true
	return fmt.Sprintf("%s to %s", stamp(first), stamp(last)), v.logsHold(last)
}

func (v *linkVerifier) logsHold(at time.Time) error {
	for _, got := range v.included {
		if err := got.Log.ValidAt(at); err != nil {
			return err
		}
	}
	return nil
}

// timeEnough counts authorities, never tokens.
func (v *linkVerifier) timeEnough() (string, error) {
	need := v.trust.file.Time.AuthoritiesNeeded
	if need == 0 {
		return "trust.json wants none", errSkip
	}
	if have := len(v.authorities); have < need {
		return "", fmt.Errorf("%d distinct time authorities, %d needed: %w", have, need, ErrNoTime)
	}
	return fmt.Sprintf("%d distinct, %d needed", len(v.authorities), need), nil
}

// timeAfterNonce: the evidence, and with it the key's commitment, cannot be
// younger than the signature.
func (v *linkVerifier) timeAfterNonce() (string, error) {
	if v.verified == nil || len(v.times) == 0 || v.detached != nil {
		return "", errSkip // a detached record's nonce is the SVID, which svid.validity judged
	}
	if n := v.verified.NonceTime(); v.first.Before(n.Add(-maxBeforeNonce)) {
		return "", fmt.Errorf("signed at %s, before the nonce of its evidence (%s)", stamp(v.first), stamp(n))
	}
	return stamp(v.first), nil
}

func authorities(n int) string {
	if n == 1 {
		return "1 authority"
	}
	return fmt.Sprintf("%d authorities", n)
}

// summary is T in words.
// Summary says in a few words who attests the time.
func (t *LinkTime) Summary() string { return t.summary() }

func (t *LinkTime) summary() string {
	if !t.Attested {
		return "the verifier's own clock: no time is attested"
	}
	return "attested by " + authorities(t.Authorities)
}

func (v *linkVerifier) timeWords() (out []Word) {
	const what = "the signing time"
	if !v.time.Attested {
		return []Word{{What: what, Who: "nobody, the verifier's own clock is used"}}
	}
	for _, s := range v.time.Sources {
		if s.Counted {
			out = append(out, Word{What: what + " " + stamp(s.Time), Who: s.who(), SameOperator: s.SameOperator})
		}
	}
	return out
}

func (s TimeSource) who() string {
	if s.Kind == SourceTimestamp {
		return "timestamp authority " + s.Authority
	}
	return s.Authority
}

// tree shows when the link was signed and who says so, above what was signed.
func (t *LinkTime) tree(top *Tree) {
	head := "signed  at a time that nobody attests: judged by the verifier's own clock, " + stamp(t.At)
	if t.Attested {
		head = "signed  " + stamp(t.At) + "  " + t.summary()
	}
	n := top.Add(head)
	for _, s := range t.Sources {
		n.Add(stamp(s.Time) + "  " + Clean(s.who()) + operatorNote(s.Operator, s.SameOperator) + notCounted(s.Counted, s.Why))
	}
	for _, l := range t.Logs {
		where := fmt.Sprintf("log %s  entry %d", Clean(l.Log), l.Index)
		if l.Size > 0 {
			where += fmt.Sprintf(" of %d", l.Size)
		}
		n.Add(where + ", " + loggedName(l.Of) + operatorNote(l.Operator, l.SameOperator) + notCounted(l.Counted, l.Why))
	}
}

func operatorNote(operator string, same bool) string {
	switch {
	case same:
		return ", same operator as the CA"
	case operator != "":
		return ", operator " + Clean(operator)
	}
	return ""
}

func notCounted(counted bool, why string) string {
	if counted {
		return ""
	}
	return "  NOT COUNTED: " + Clean(why)
}
