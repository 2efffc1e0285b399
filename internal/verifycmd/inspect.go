package verifycmd

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/archive"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// InspectCommand returns `rootlink inspect`.
func InspectCommand() *cobra.Command {
	var extract string
	var executables bool
	cmd := &cobra.Command{
		Use:   "inspect FILE [--extract DIR]",
		Short: "Show what is in a bundle, an SVID or trust.json, without verifying it",
		Long: `Show what is in a bundle, an SVID (PEM or DER), trust.json, the log proof beside
a bundle (*.tlog.json), detached evidence (*.evidence.cbor) or an unsigned record, without verifying it: nothing that
is printed has been checked. "-" is standard input.

--extract writes the parts of a bundle or SVID into DIR, in the forms that other
tools read, so that they can judge them:

  quote.msg quote.sig pcrs.out extradata.hex   for tpm2_checkquote
  ak.pem ak-cert.pem ek.pem ek-cert.pem        for openssl
  svid.pem statement.json evidence.cbor nonce.hex agent-svid.pem`,
		Example: `  rootlink inspect hello` + link.BundleSuffix + ` --extract parts
  tpm2_checkquote -u parts/ak.pem -m parts/quote.msg -s parts/quote.sig \
      -f parts/pcrs.out -q "$(cat parts/extradata.hex)"`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cli.Usage("see `"+c.CommandPath()+" --help`", "%d files, exactly one is inspected", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if executables {
				return printToolList(cmd, args[0])
			}
			return inspect(cmd, args[0], extract)
		},
	}
	cmd.Flags().BoolVar(&executables, "executables", false, "print the programs that the recorder says ran, as a tool list")
	cmd.Flags().StringVar(&extract, "extract", "", "`DIR` to write the parts into (made if missing)")
	return cmd
}

// inspected is what a file turned out to hold. Nothing in it is verified.
type inspected struct {
	kind     string
	bundle   *link.Bundle
	bare     []byte // a statement that nobody signed
	cert     *x509.Certificate
	evidence *attest.Evidence // nil: none
	parent   *attest.Parent   // nil: none, or evidence of another kind
	detached *attest.Detached // where evidence is from; nil: from the certificate
	trust    *link.Trust
	proof    *rekorv1.TransparencyLogEntry
}

var errUnknownFile = errors.New("neither a bundle, nor a certificate, nor trust.json, nor detached evidence, nor a log proof, nor an unsigned record")

func inspect(cmd *cobra.Command, name, extract string) error {
	raw, err := cli.ReadInput(name, link.MaxBundle)
	if err != nil {
		return err
	}
	in, err := decode(raw)
	if err == nil && in.bundle != nil && in.evidence == nil && name != "-" {
		err = in.findDetached(name)
	}
	if err != nil {
		h := ""
		if errors.Is(err, errUnknownFile) {
			h = whoShows(raw)
		}
		return cli.Fail(cli.ExitInternal, fmt.Errorf("%s: %w", name, err), h)
	}
	v := in.view()
	if cli.WantsJSON(cmd) {
		if err := cli.PrintJSON(cmd.OutOrStdout(), v); err != nil {
			return err
		}
	} else {
		var b strings.Builder
		label := "UNVERIFIED"
		if in.bare != nil {
			label = "UNSIGNED"
		}
		fmt.Fprintf(&b, "%s %s: nothing below was checked\n", label, strings.ReplaceAll(in.kind, "_", " "))
		v[2:].text(&b, "")
		if _, err := fmt.Fprint(cmd.OutOrStdout(), b.String()); err != nil {
			return err
		}
	}
	if extract == "" {
		return nil
	}
	if in.cert == nil && in.evidence == nil {
		return cli.Usage("inspect a bundle or an SVID", "%s holds no parts to extract", name)
	}
	return in.extract(cmd, extract)
}

// whoShows is what to do with a file that inspect does not read.
func whoShows(raw []byte) string {
	kind, _, _, err := link.Document(raw)
	switch {
	case err == nil && kind == link.KindRevocations:
		return "revocations are printed by rootlink trust show"
	case layout.IsFile(raw):
		return "layouts are printed by rootlink layout show"
	case bytes.HasPrefix(raw, []byte(archive.ManifestName+"\x00")):
		return "archives are judged by rootlink archive check; they are tar files, so tar tf lists them"
	default:
		return "rootlink run writes bundles, rootlink-server trust export writes trust.json"
	}
}

func decode(raw []byte) (*inspected, error) {
	in := &inspected{}
	var err error
	switch block, _ := pem.Decode(raw); {
	case link.IsTrust(raw):
		in.kind = "trust.json"
		_, doc, _, err := link.Document(raw)
		if err != nil {
			return nil, err
		}
		in.trust, err = link.ParseUnsignedTrust(doc)
		return in, err
	case link.IsBundle(raw):
		in.kind = "bundle"
		if in.bundle, err = link.ParseBundle(raw); err != nil {
			return nil, err
		}
		in.cert = in.bundle.UnverifiedCertificate()
	case link.IsStatement(raw):
		// What run writes with --if-unavailable unsigned.
		in.kind, in.bare = "statement", bytes.TrimSuffix(raw, []byte("\n"))
		_, err = link.ParseStatement(in.bare)
		return in, err
	case block != nil && block.Type == "CERTIFICATE":
		in.kind = "certificate"
		if in.cert, err = x509.ParseCertificate(block.Bytes); err != nil {
			return nil, err
		}
	case len(raw) > 0 && raw[0]>>5 == 5: // a CBOR map
		in.kind = "detached_evidence"
		if in.detached, err = attest.ParseDetached(raw); err != nil {
			return nil, errUnknownFile
		}
		in.evidence = in.detached.Evidence
		return in, nil
	case bytes.HasPrefix(bytes.TrimLeft(raw, " \t\r\n"), []byte("{")):
		if in.proof, err = tlog.ParseEntry(raw); err != nil {
			return nil, errUnknownFile
		}
		in.kind = "log_proof"
		return in, nil
	default:
		in.kind = "certificate"
		// An SVID's DER may be followed by its chain.
		certs, err := x509.ParseCertificates(raw)
		if err != nil || len(certs) == 0 {
			return nil, errUnknownFile
		}
		in.cert = certs[0]
	}
	in.evidence, err = attest.FromCertificate(in.cert)
	var perr error
	if in.parent, perr = attest.ParentFromCertificate(in.cert); perr == nil || errors.Is(err, attest.ErrNoEvidence) {
		err = nil
	}
	return in, err
}

// findDetached takes the record that lies beside a bundle without evidence.
func (in *inspected) findDetached(name string) error {
	raw, err := findDetached(name, in.bundle)
	if err != nil || raw == nil {
		return err
	}
	if in.detached, err = attest.ParseDetached(raw); err != nil {
		return fmt.Errorf("%s: %w", in.bundle.DetachedName(), err)
	}
	in.evidence = in.detached.Evidence
	return nil
}

func (in *inspected) view() view {
	v := view{{"unverified", true}, {"kind", in.kind}}
	if in.trust != nil {
		return append(v, trustView(in.trust)...)
	}
	if in.proof != nil {
		return append(v, proofView(in.proof)...)
	}
	if in.bare != nil {
		v.add("signed", false)
		v.add("statement", statementView(in.bare))
		return v
	}
	if in.bundle != nil {
		v.add("statement", statementView(in.bundle.UnverifiedPayload()))
		v = append(v, timeView(in.bundle)...)
	}
	if in.cert != nil {
		v.add("certificate", certificateView(in.cert))
	}
	if in.detached != nil {
		v.add("detached", detachedView(in.detached))
	}
	switch {
	case in.evidence == nil && in.parent != nil:
		v.add("evidence", parentView(in.parent))
	case in.evidence == nil:
		v.add("evidence", "none")
	default:
		v.add("evidence", evidenceView(in.evidence))
	}
	return v
}

func statementView(payload []byte) (v view) {
	digest := link.PayloadDigest(payload)
	v.add("payload_sha256", hex.EncodeToString(digest[:]))
	s, err := link.ParseStatement(payload)
	if err != nil {
		if a, aerr := link.ParseAttestation(payload); aerr == nil && a.Type != link.PredicateType {
			v.add("predicate_type", a.Type)
			v.add("subjects", resources(a.Subjects))
			return v
		}
		v.add("error", err.Error())
		return v
	}
	v.add("step", s.Step)
	v.add("command", s.Command)
	v.add("products", resources(s.Subjects))
	v.add("materials", resources(s.Materials))
	if s.Byproducts.ExitCode != nil {
		v.add("exit_code", *s.Byproducts.ExitCode)
	}
	v.addIf("signal", s.Byproducts.Signal)
	v = append(v, ranView(s)...)
	if g := s.Environment.Git; g != nil {
		v.addIf("git_commit", g.Commit)
		v.addIf("git_remote", g.Remote)
		if g.Dirty != nil {
			v.add("git_dirty", *g.Dirty)
		}
	}
	return v
}

// timeView lists what is meant to show when the bundle was signed.
func timeView(b *link.Bundle) (v view) {
	var tokens, entries []string
	for _, raw := range b.Timestamps() {
		t, err := timestamp.Parse(raw)
		if err != nil {
			tokens = append(tokens, err.Error())
			continue
		}
		signer := t.UnverifiedSigner()
		tokens = append(tokens, stamp(t.UnverifiedTime())+" by certificate sha256:"+hex.EncodeToString(signer[:]))
	}
	for _, e := range b.LogEntries() {
		p := e.GetInclusionProof()
		entries = append(entries, fmt.Sprintf("%d in a tree of %d, log %s (%s)", e.GetLogIndex(), p.GetTreeSize(),
			hex.EncodeToString(e.GetLogId().GetKeyId()), tlog.UnverifiedOrigin([]byte(p.GetCheckpoint().GetEnvelope()))))
	}
	if len(tokens) > 0 {
		v.add("timestamps", tokens)
	}
	if len(entries) > 0 {
		v.add("log_entries", entries)
	}
	return v
}

func resources(rs []link.Resource) []string {
	out := make([]string, len(rs))
	for i, r := range rs {
		out[i] = r.Name + " " + digests(r.Digest)
	}
	return out
}
