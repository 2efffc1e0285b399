package main

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/internal/tlog"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

func logCommand(at *location) *cobra.Command {
	return cli.Group("log", "The transparency log of what is signed and certified", logCheck(at), logShow(at), logKey(at))
}

// logSource says which log a command reads.
type logSource struct{ url, key string }

func (s *logSource) flags(c *cobra.Command) {
	c.Flags().StringVar(&s.url, "url", "", "read the log from this `URL`, such as http://127.0.0.1:8082/log (default: the data directory)")
	c.Flags().StringVar(&s.key, "key", "", "`KEY` of the log, as log key prints it (default: that of the data directory)")
}

func (s *logSource) open(at *location) (src tlog.Source, l pub.Log, err error) {
	if s.key != "" {
		l, err = parseLogKey(s.key)
	} else {
		l, err = tlog.ReadIdentity(at.dataDir)
		if errors.Is(err, fs.ErrNotExist) {
			err = cli.Fail(cli.ExitUsage, err, "name the server's directory with --data-dir, or a log elsewhere with --url and --key")
		}
	}
	if err != nil {
		return nil, l, err
	}
	if s.url == "" {
		if s.key != "" {
			return nil, l, cli.Usage("say with --url where the log is", "--key without --url")
		}
		return tlog.FromDir(at.dataDir), l, nil
	}
	if src, err = tlog.FromURL(s.url); err != nil {
		return nil, l, cli.Usage("such as http://127.0.0.1:8082/log", "--url: %w", err)
	}
	return src, l, nil
}

func parseLogKey(vkey string) (pub.Log, error) {
	const hint = "it looks like log.example.org+1a2b3c4d+A…; `log key` prints it"
	origin, rest, _ := strings.Cut(vkey, "+")
	_, b64, _ := strings.Cut(rest, "+")
	raw, err := base64.StdEncoding.DecodeString(b64)
	if err != nil || len(raw) != 1+ed25519.PublicKeySize || pub.CheckOrigin(origin) != nil || pub.VKey(origin, raw[1:]) != vkey {
		return pub.Log{}, cli.Usage(hint, "--key %.200q is no log's key", vkey)
	}
	key := ed25519.PublicKey(raw[1:])
	return pub.Log{Origin: origin, Key: key, ID: pub.LogID(origin, key)}, nil
}

// logError gives the ways in which a log can be wrong their exit code.
func logError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, pub.ErrFork):
		return cli.Fail(cli.ExitCrypto, err, "somebody was shown another log: keep both checkpoints, they prove it")
	case errors.Is(err, tlog.ErrLost), errors.Is(err, pub.ErrCheckpoint), errors.Is(err, pub.ErrMalformed):
		return cli.Fail(cli.ExitCrypto, err, "the log was damaged or tampered with: compare it with a backup or a copy that somebody else keeps")
	}
	return err
}

type logCheckJSON struct {
	Origin       string       `json:"origin"`
	Size         uint64       `json:"size"`
	Root         string       `json:"root"`
	Signatures   int          `json:"signatures"`
	Certificates int          `json:"certificates"`
	Compared     *int         `json:"compared"` // with so many records of the server; null when not
	Pending      int          `json:"pending"`
	Consistent   string       `json:"consistent_with,omitempty"` // file of the older checkpoint
	Alarms       []tlog.Alarm `json:"alarms"`
	MoreAlarms   int          `json:"more_alarms,omitempty"`
}

func logCheck(at *location) *cobra.Command {
	var from logSource
	var since, save string
	var noCompare bool
	c := &cobra.Command{
		Use: "check", Short: "Verify the whole log, and compare it with what this server issued", Args: cobra.NoArgs,
	}
	from.flags(c)
	c.Flags().StringVar(&since, "since", "", "`FILE` with an older checkpoint that the log must continue")
	c.Flags().StringVar(&save, "save", "", "`FILE` to write the checkpoint to, for a later --since")
	c.Flags().BoolVar(&noCompare, "no-compare", false, "do not compare with this server's records (always so with --key)")
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx := c.Context()
		src, l, err := from.open(at)
		if err != nil {
			return err
		}
		src = &oneCheckpoint{Source: src}
		issued := func(ctx context.Context) ([]tlog.Issued, error) { return readIssued(ctx, at.dataDir) }
		if noCompare || from.key != "" {
			issued = nil
		}
		a, err := tlog.RunAudit(ctx, src, l, nil, issued, time.Now())
		if err != nil {
			return logError(err)
		}
		if since != "" {
			if err := checkSince(ctx, src, l, since, a.Checkpoint); err != nil {
				return err
			}
		}
		if save != "" {
			signed, err := src.ReadCheckpoint(ctx)
			if err != nil {
				return err
			}
			if err := files.Write(save, signed, 0o644); err != nil {
				return err
			}
		}
		out := logCheckJSON{
			Origin: l.Origin, Size: a.Checkpoint.Size, Root: hex.EncodeToString(a.Checkpoint.Root[:]),
			Signatures: a.Signatures, Certificates: a.Certificates, Pending: a.Pending, Consistent: since,
			Alarms: list(a.Alarms), MoreAlarms: a.More,
		}
		if issued != nil {
			out.Compared = &a.Compared
		}
		if err := emit(c, out, func(w io.Writer) error { return printLogCheck(w, out) }); err != nil {
			return err
		}
		if len(a.Alarms) > 0 {
			return cli.Fail(cli.ExitPolicy, fmt.Errorf("the tree is sound, and %d of its entries or records are not", len(a.Alarms)+a.More),
				"an unknown certificate means that somebody else signs with a CA key of this server; a missing one, that its log or its records were changed")
		}
		return nil
	}
	return c
}

func printLogCheck(w io.Writer, o logCheckJSON) error {
	var f fields
	verdict := "sound: every entry was read, and hashes to the checkpoint's root"
	if len(o.Alarms) > 0 {
		verdict = fmt.Sprintf("%d ALARMS", len(o.Alarms))
	}
	f.add("verdict", verdict)
	f.add("log", o.Origin)
	f.add("size", strconv.FormatUint(o.Size, 10))
	f.add("root", o.Root)
	f.add("entries", fmt.Sprintf("%d signatures, %d certificates", o.Signatures, o.Certificates))
	switch {
	case o.Compared == nil:
		f.add("records", "not compared")
	case o.Pending > 0:
		f.add("records", fmt.Sprintf("%d certificates issued, %d of them not published yet", *o.Compared, o.Pending))
	default:
		f.add("records", fmt.Sprintf("%d certificates issued", *o.Compared))
	}
	if o.Consistent != "" {
		f.add("continues", o.Consistent)
	}
	for _, a := range o.Alarms {
		where := ""
		if a.Index != nil {
			where = fmt.Sprintf("entry %d: ", *a.Index)
		}
		if a.SHA256 != "" {
			where += a.SHA256 + ": "
		}
		f.add("ALARM "+string(a.Kind), where+a.Detail)
	}
	return f.print(w)
}

// readIssued reads the records without the server, which may be running.
func readIssued(ctx context.Context, dataDir string) ([]tlog.Issued, error) {
	list, err := store.ReadCertificates(ctx, filepath.Join(dataDir, "server.db"))
	if err != nil {
		return nil, cli.Hint(err, "run it on the server's machine as its user, or add --no-compare to verify the tree alone")
	}
	out := make([]tlog.Issued, len(list))
	for i, c := range list {
		out[i] = tlog.Issued{Digest: c.Digest, Kind: string(c.Kind), Subject: c.Subject, IssuedAt: c.IssuedAt, Pending: c.Body != nil}
	}
	return out, nil
}

func checkSince(ctx context.Context, src tlog.Source, l pub.Log, path string, now pub.Checkpoint) error {
	raw, err := cli.ReadInput(path, pub.MaxCheckpoint)
	if err != nil {
		return err
	}
	old, _, err := pub.OpenCheckpoint(raw, &l, nil)
	if err != nil {
		return cli.Fail(cli.ExitCrypto, fmt.Errorf("%s: %w", path, err), "--since takes a checkpoint of this log, as --save wrote it")
	}
	if old.Size > now.Size {
		return cli.Fail(cli.ExitCrypto, fmt.Errorf("%w: it had %d entries by %s and has %d now", tlog.ErrLost, old.Size, path, now.Size),
			"the log was rolled back: keep that checkpoint, it proves it")
	}
	return logError(tlog.CheckConsistent(ctx, src, *old, now))
}

// oneCheckpoint reads the checkpoint once: all that a command says is about one
// state of a log that grows meanwhile.
type oneCheckpoint struct {
	tlog.Source
	signed []byte
}

func (o *oneCheckpoint) ReadCheckpoint(ctx context.Context) (_ []byte, err error) {
	if o.signed == nil {
		o.signed, err = o.Source.ReadCheckpoint(ctx)
	}
	return o.signed, err
}

func logShow(at *location) *cobra.Command {
	var from logSource
	c := &cobra.Command{
		Use: "show INDEX", Short: "Print one entry of the log", Args: cobra.ExactArgs(1),
	}
	from.flags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		idx, err := strconv.ParseUint(args[0], 10, 63)
		if err != nil {
			return cli.Usage("a number from 0 on", "index %q", args[0])
		}
		src, l, err := from.open(at)
		if err != nil {
			return err
		}
		body, cp, err := tlog.ReadEntry(c.Context(), src, l, idx)
		if errors.Is(err, tlog.ErrNotLogged) {
			return cli.Fail(cli.ExitUsage, err, "indexes begin with 0")
		}
		if err != nil {
			return logError(err)
		}
		e, err := pub.ParseBody(body)
		if err != nil {
			return logError(err)
		}
		valid := e.CheckSignature() == nil
		about := "signature"
		if e.Certificate.IsCA {
			about = "certificate"
		}
		signer := e.Certificate.Subject.String()
		if len(e.Certificate.URIs) == 1 {
			signer = e.Certificate.URIs[0].String()
		}
		out := struct {
			Index          uint64          `json:"index"`
			Size           uint64          `json:"size"`
			About          string          `json:"about"`
			Digest         string          `json:"digest"`
			Signer         string          `json:"signer"`
			SignatureValid bool            `json:"signature_valid"`
			NotBefore      time.Time       `json:"not_before"`
			Body           json.RawMessage `json:"body"`
		}{idx, cp.Size, about, hex.EncodeToString(e.Digest[:]), signer, valid, e.Certificate.NotBefore.UTC(), body}
		return emit(c, out, func(w io.Writer) error {
			var f fields
			f.add("entry", fmt.Sprintf("%d of %d", idx, cp.Size))
			f.add("about", about)
			f.add("digest", "sha256:"+out.Digest)
			f.add("signed by", signer)
			f.add("signature", map[bool]string{true: "good", false: "BAD"}[valid])
			return f.print(w)
		})
	}
	return c
}

func logKey(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "key", Short: "Print the log's name and key", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			l, err := tlog.ReadIdentity(at.dataDir)
			if errors.Is(err, fs.ErrNotExist) {
				return cli.Fail(cli.ExitUsage, err, "name the server's directory with --data-dir; a server makes its log at the first start")
			}
			if err != nil {
				return err
			}
			out := struct {
				Origin      string `json:"origin"`
				Key         string `json:"key"`
				Fingerprint string `json:"fingerprint"` // Sigstore's log ID
			}{l.Origin, pub.VKey(l.Origin, l.Key.(ed25519.PublicKey)), hex.EncodeToString(l.ID)}
			return emit(c, out, func(w io.Writer) error {
				return fields{{"origin:", out.Origin}, {"key:", out.Key}, {"fingerprint:", out.Fingerprint}}.print(w)
			})
		},
	}
}
