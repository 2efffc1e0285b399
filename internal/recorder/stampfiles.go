package recorder

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/stamp"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// StampFiles is one run of `rootlink stamp`.
type StampFiles struct {
	Files          []string
	Stamping       Stamping
	Check          bool // say what is there, ask nobody
	Timeout        time.Duration
	JSON           bool
	Stdout, Stderr io.Writer
}

// StampedView is what a bundle has, none of it verified.
type StampedView struct {
	File       string      `json:"file"`
	ValidUntil time.Time   `json:"svid_valid_until"`
	Expired    bool        `json:"svid_expired"`
	Timestamps []TokenView `json:"timestamps"`
	Entries    []EntryView `json:"log_entries"`
	AKProof    string      `json:"ak_proof,omitempty"` // file beside the bundle
	Record     *RecordView `json:"record,omitempty"`
}

// RecordView is the detached record beside the bundle.
type RecordView struct {
	File      string     `json:"file"`
	Timestamp *TokenView `json:"timestamp,omitempty"`
}

// TokenView is one timestamp token.
type TokenView struct {
	Time   time.Time `json:"time"`
	Signer string    `json:"signer_sha256"` // of the certificate that it says signed it
}

// EntryView is one log entry.
type EntryView struct {
	Index int64  `json:"index"`
	Size  int64  `json:"tree_size"`
	LogID string `json:"log_id"`
}

// Run completes every bundle it can, and fails when one is not complete.
func (s *StampFiles) Run() error {
	if len(s.Files) == 0 {
		return cli.Usage("name the "+link.BundleSuffix+" files", "no bundle")
	}
	plan, err := s.Stamping.Plan()
	if err != nil {
		return cli.Fail(cli.ExitUsage, err, cli.HintOf(err))
	}
	if plan.Empty() && !s.Check {
		return cli.Usage("--timestamp-url and --log-url name them, as `rootlink run` said; --check only looks", "nobody to ask for a timestamp or log entry")
	}
	if s.Timeout <= 0 {
		return cli.Usage("such as 1m", "--timeout must be positive")
	}
	ctx, stop := interruptible()
	defer stop()
	views := []StampedView{}
	var first error
	for _, name := range s.Files {
		err := s.one(ctx, name, plan)
		if ctx.Err() != nil {
			return cli.Fail(130, errors.New("interrupted: the bundle is as it was"), "run it again")
		}
		if v, verr := stampedView(name); verr == nil {
			views = append(views, v)
		}
		if err != nil {
			err = cli.Fail(cli.ExitCode(err), fmt.Errorf("%s: %w", name, err), cli.HintOf(err))
			if first == nil {
				first = err
			} else {
				cli.Report(s.Stderr, err)
			}
		}
	}
	if s.JSON {
		err = cli.PrintJSON(s.Stdout, views)
	} else {
		for _, v := range views {
			v.print(s.Stdout)
		}
	}
	return errors.Join(first, err)
}

func (s *StampFiles) one(ctx context.Context, name string, plan stamp.Plan) error {
	b, err := readBundle(name)
	if err != nil || s.Check {
		return err
	}
	dir := filepath.Dir(name)
	plan.HaveProof = func(proof string) bool { _, err := os.Stat(filepath.Join(dir, proof)); return err == nil }
	limited, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	c := stamp.NewClient()
	defer c.Close()
	record, recordName, err := readRecord(name, b)
	if err != nil {
		return err
	}
	out, err := c.CompleteWith(limited, b, record, plan, Teller(func(msg string) {
		fmt.Fprintln(s.Stderr, "rootlink: "+cli.Clean(fmt.Sprintf("waiting, up to %s: %s", s.Timeout, msg)))
	}))
	if errors.Is(err, stamp.ErrTooLate) {
		return cli.Fail(cli.ExitPolicy, err, "a timestamp from now on would not show that it was signed before; run the step again")
	}
	if err != nil {
		return err
	}
	if out.Proof != nil {
		if err := files.Write(filepath.Join(dir, out.ProofAs), out.Proof, 0o644); err != nil {
			return err
		}
	}
	if out.Detached != nil {
		raw, err := out.Detached.Marshal()
		if err != nil {
			return err
		}
		if err := replace(recordName, raw); err != nil {
			return err
		}
	}
	if out.Changed {
		raw, err := out.Bundle.Marshal()
		if err != nil {
			return err
		}
		if err := replace(name, raw); err != nil {
			return err
		}
	}
	for _, m := range out.Missing {
		if !m.Needed {
			fmt.Fprintln(s.Stderr, "rootlink: "+cli.Clean(fmt.Sprintf("%s: WITHOUT the %s, which was not needed", name, m)))
		}
	}
	until := b.UnverifiedCertificate().NotAfter.UTC()
	return cli.Fail(cli.ExitInternal, out.Err(), "what was obtained is in it; the rest can be had until "+until.Format(time.RFC3339))
}

// replace writes over a file that is there.
func replace(name string, raw []byte) error {
	st, err := os.Stat(name)
	if err != nil {
		return err
	}
	return files.Write(name, raw, st.Mode().Perm())
}

// readRecord reads the detached record beside a bundle; nil where there is none.
func readRecord(name string, b *link.Bundle) (*attest.Detached, string, error) {
	as := b.DetachedName()
	if as == "" {
		return nil, "", nil
	}
	file := filepath.Join(filepath.Dir(name), as)
	raw, err := files.Read(file, attest.MaxDetached)
	if errors.Is(err, os.ErrNotExist) {
		return nil, "", nil // signed without evidence, or it lies elsewhere
	}
	if err != nil {
		return nil, "", err
	}
	d, err := attest.ParseDetached(raw)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", file, err)
	}
	return d, file, nil
}

func readBundle(name string) (*link.Bundle, error) {
	raw, err := files.Read(name, link.MaxBundle)
	if err != nil {
		return nil, err
	}
	b, err := link.ParseBundle(raw)
	if err != nil {
		return nil, cli.Fail(cli.ExitInternal, err, "is this what `rootlink run` wrote? `rootlink inspect FILE` shows what a file holds")
	}
	return b, nil
}

func stampedView(name string) (v StampedView, err error) {
	b, err := readBundle(name)
	if err != nil {
		return v, err
	}
	svid := b.UnverifiedCertificate()
	v = StampedView{File: name, ValidUntil: svid.NotAfter.UTC(), Expired: time.Now().After(svid.NotAfter), Timestamps: []TokenView{}, Entries: []EntryView{}}
	for _, raw := range b.Timestamps() {
		t, err := timestamp.Parse(raw)
		if err != nil {
			return v, err
		}
		id := t.UnverifiedSigner()
		v.Timestamps = append(v.Timestamps, TokenView{t.UnverifiedTime().UTC(), hex.EncodeToString(id[:])})
	}
	for _, e := range b.LogEntries() {
		v.Entries = append(v.Entries, EntryView{e.GetLogIndex(), e.GetInclusionProof().GetTreeSize(), hex.EncodeToString(e.GetLogId().GetKeyId())})
	}
	d, file, err := readRecord(name, b)
	if err != nil {
		return v, err
	}
	if d != nil {
		v.Record = &RecordView{File: filepath.Base(file)}
		if len(d.Token) > 0 {
			t, err := timestamp.Parse(d.Token)
			if err != nil {
				return v, fmt.Errorf("%s: %w", file, err)
			}
			id := t.UnverifiedSigner()
			v.Record.Timestamp = &TokenView{t.UnverifiedTime().UTC(), hex.EncodeToString(id[:])}
		}
	}
	if ak := stamp.AKCertificate(b); ak != nil {
		if _, err := os.Stat(filepath.Join(filepath.Dir(name), link.LogProofName(ak))); err == nil {
			v.AKProof = link.LogProofName(ak)
		}
	}
	return v, nil
}

func (v StampedView) print(w io.Writer) {
	state := "SVID valid until " + v.ValidUntil.Format(time.RFC3339)
	if v.Expired {
		state = "SVID EXPIRED at " + v.ValidUntil.Format(time.RFC3339)
	}
	fmt.Fprintf(w, "%s  (nothing here is verified)\n  %s\n", cli.Clean(v.File), state)
	for _, t := range v.Timestamps {
		fmt.Fprintf(w, "  timestamp %s by certificate %s\n", t.Time.Format(time.RFC3339), t.Signer[:12])
	}
	if len(v.Timestamps) == 0 {
		fmt.Fprintln(w, "  NO TIMESTAMP")
	}
	for _, e := range v.Entries {
		fmt.Fprintf(w, "  entry %d in a tree of %d of log %.12s\n", e.Index, e.Size, e.LogID)
	}
	if len(v.Entries) == 0 {
		fmt.Fprintln(w, "  NO LOG ENTRY")
	}
	switch {
	case v.Record != nil && v.Record.Timestamp != nil:
		fmt.Fprintf(w, "  evidence beside it, timestamp %s by certificate %s\n", v.Record.Timestamp.Time.Format(time.RFC3339), v.Record.Timestamp.Signer[:12])
	case v.Record != nil:
		fmt.Fprintln(w, "  evidence beside it, NO TIMESTAMP")
	}
	if v.AKProof != "" {
		fmt.Fprintf(w, "  proof of the AK certificate beside it\n")
	}
}
