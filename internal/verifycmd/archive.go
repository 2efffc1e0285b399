package verifycmd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	stamping "github.com/rootlink/rootlink/internal/stamp"
	"github.com/rootlink/rootlink/pkg/archive"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// ArchiveCommand returns `rootlink archive`.
func ArchiveCommand() *cobra.Command { return archiveCommand(time.Now) }

func archiveCommand(clock func() time.Time) *cobra.Command {
	var o verifyOptions
	var out string
	var urls []string
	cmd := &cobra.Command{
		Use:   "archive --trust FILE (--identity PATTERN | --layout FILE) --out FILE BUNDLE... [ARTIFACT...]",
		Short: "Verify, and put all that a later verifier needs into one file",
		Long: `Verify, and put all that a later verifier needs into one file: bundles, layout,
the signed trust.json, revocations, boot event logs, log proofs and checkpoints,
and the digests of the artifacts. The artifacts themselves stay where they are.

The file is a tar that anybody can unpack. A timestamp over its manifest shows
when it was made: with it, rootlink verify --archive still works when trust.json
has long expired, and a later file of revocations can be laid beside it.`,
		Example: `  rootlink archive --trust trust.json --layout hello.layout --out hello.archive *` + link.BundleSuffix + ` hello
  rootlink verify --archive hello.archive --trust-key FINGERPRINT hello`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return cli.Usage("--out FILE", "where is the archive to go?")
			}
			return writeArchive(cmd, o, clock, out, urls, args)
		},
	}
	f := cmd.Flags()
	o.register(f)
	f.StringVar(&out, "out", "", "`FILE` to write")
	f.StringArrayVar(&urls, "timestamp-url", nil, "`URL` of an RFC 3161 authority for the archive's own token, or none (repeatable: the first that answers; default those in trust.json)")
	cmd.AddCommand(archiveCheckCommand(clock))
	return cmd
}

func writeArchive(cmd *cobra.Command, o verifyOptions, clock func() time.Time, out string, urls, args []string) error {
	q, err := o.prepare(cmd.Context(), clock(), args)
	if err != nil {
		return err
	}
	defer q.placed.remove()
	c, err := o.collect(cmd, q)
	if err != nil {
		return err
	}
	a, err := c.build(&o, q)
	if err != nil {
		return cli.Fail(cli.ExitInternal, err, "give files of one name apart other names")
	}
	note := func(format string, v ...any) {
		fmt.Fprintf(cmd.ErrOrStderr(), "rootlink: "+format+"\n", v...)
	}
	switch {
	case len(urls) == 0:
		for _, t := range c.trust.TrustedRoot().Timestamps {
			if t.URI != "" && !slices.Contains(urls, t.URI) {
				urls = append(urls, t.URI)
			}
		}
	case slices.Contains(urls, stamping.None):
		urls = nil
	}
	if len(urls) == 0 {
		note("NO TOKEN: once trust.json expires at %s, the archive verifies only with a newer one beside it", c.trust.Expires().Format(time.RFC3339))
	} else if err := stampArchive(cmd.Context(), a, urls, c.trust.TrustedRoot().Timestamps); err != nil {
		return cli.Fail(cli.ExitInternal, err, "--timestamp-url names another authority of trust.json; --timestamp-url none leaves the token away")
	}
	f, err := files.Create(out, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := a.WriteTo(f)
	if err != nil {
		return err
	}
	if err := f.Commit(); err != nil {
		return err
	}
	if cli.WantsJSON(cmd) {
		return cli.PrintJSON(cmd.OutOrStdout(), struct {
			Out      string           `json:"out"`
			Bytes    int64            `json:"bytes"`
			Stamped  bool             `json:"stamped"`
			Manifest archive.Manifest `json:"manifest"`
		}{out, n, a.Token() != nil, a.Manifest})
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d files, %d bytes. `rootlink archive check %s` says what it lacks.\n", out, len(a.Manifest.Files), n, out)
	return err
}

// contents is what was verified and goes into an archive.
type contents struct {
	trust       *link.Trust
	doc         []byte // trust.json
	links       []link.LinkInput
	artifacts   []link.Artifact
	checkpoints []link.SeenCheckpoint
	results     []link.LinkResult
	layout      *Pipeline
}

// collect verifies: an archive of what does not verify today would only hide
// for ten years that something is wrong.
func (o *verifyOptions) collect(cmd *cobra.Command, q *question) (*contents, error) {
	if o.pipeline.file != "" {
		p, doc, verdict := judgePipeline(o, q)
		if p == nil {
			return nil, verdict
		}
		if verdict != nil {
			fmt.Fprint(cmd.ErrOrStderr(), p.Result.Text())
			return nil, pipelineOutcome(p.Result, verdict)
		}
		return &contents{p.Trust, doc, p.Input.Links, p.Input.Artifacts, p.Result.Checkpoints, p.Result.Links, p}, nil
	}
	j, verdict := judgeLinks(o, q)
	if j == nil {
		return nil, verdict
	}
	if verdict != nil {
		fmt.Fprint(cmd.ErrOrStderr(), j.Result.Text())
		return nil, outcome(j.Result, verdict)
	}
	return &contents{j.Trust, j.doc, j.Input.Links, j.Input.Artifacts, j.Result.Checkpoints, j.Result.Links, nil}, nil
}

func (c *contents) build(o *verifyOptions, q *question) (*archive.Archive, error) {
	ask := archive.Question{Identity: o.identity, Type: q.wantType}
	if !q.notBefore.IsZero() {
		ask.NotBefore = &q.notBefore
	}
	if c.layout != nil {
		ask = archive.Question{Layout: filepath.Base(c.layout.Input.Layout.Name), BuildID: o.pipeline.buildID, NotBefore: ask.NotBefore, SkipInspections: o.pipeline.skip}
	}
	b := archive.NewBuilder(q.now, c.trust.TrustDomain(), ask)
	var err error
	add := func(role, name string, content []byte) {
		if err == nil && content != nil {
			err = b.Add(role, filepath.Base(name), content)
		}
	}
	add(archive.RoleTrust, "trust.json", c.doc)
	for _, name := range o.revocations {
		raw, rerr := cli.ReadInput(name, link.MaxTrustFile)
		if rerr != nil {
			return nil, rerr
		}
		add(archive.RoleRevocations, name, raw)
	}
	for _, l := range c.links {
		add(archive.RoleBundle, l.Name, l.Bundle)
		record, name, proof := namesBeside(l)
		add(archive.RoleDetached, record, l.Detached)
		add(archive.RoleEventLog, name, l.EventLog)
		for _, p := range l.LogProofs {
			add(archive.RoleLogProof, proof, p)
		}
	}
	for _, cp := range c.checkpoints {
		if signed := c.signedForm(cp); signed != nil {
			add(archive.RoleCheckpoint, checkpointName(cp), signed)
		}
	}
	if p := c.layout; p != nil {
		add(archive.RoleLayout, p.Input.Layout.Name, p.Input.Layout.Raw)
		for _, s := range p.Input.Sublayouts {
			add(archive.RoleSublayout, s.Name, s.Raw)
		}
		for _, s := range p.Input.Classic {
			add(archive.RoleClassic, s.Name, s.Raw)
		}
	}
	if err != nil {
		return nil, err
	}
	for _, a := range c.artifacts {
		if len(a.Digest) > 0 {
			b.Artifact(link.Artifact{Name: filepath.Base(a.Name), Digest: a.Digest})
			continue
		}
		for name, sum := range a.Files { // a directory whose files are listed one by one
			b.Artifact(link.Artifact{Name: filepath.Base(a.Name) + "/" + name, Digest: map[string]string{"sha256": sum}})
		}
	}
	return b.Close()
}

// namesBeside are the names of what lies beside a bundle that was verified.
func namesBeside(l link.LinkInput) (record, eventLog, logProof string) {
	b, err := link.ParseBundle(l.Bundle)
	if err != nil {
		return "", "", ""
	}
	eventLog, logProof = b.NamesBeside(l.Detached)
	return b.DetachedName(), eventLog, logProof
}

func checkpointName(c link.SeenCheckpoint) string {
	return fmt.Sprintf("%s-%d.checkpoint", c.Origin, c.Size)
}

// signedForm finds the signed form of a tree that was verified, in what showed
// it: a bundle, a proof beside one, or trust.json. Who keeps it can later ask the
// log to prove that it only grew.
func (c *contents) signedForm(want link.SeenCheckpoint) []byte {
	is := func(e *rekorv1.TransparencyLogEntry) []byte {
		signed := []byte(e.GetInclusionProof().GetCheckpoint().GetEnvelope())
		if tlog.UnverifiedOrigin(signed) != want.Origin || e.GetInclusionProof().GetTreeSize() != int64(want.Size) {
			return nil
		}
		return signed
	}
	for _, l := range c.links {
		if b, err := link.ParseBundle(l.Bundle); err == nil {
			for _, e := range b.LogEntries() {
				if signed := is(e); signed != nil {
					return signed
				}
			}
		}
	}
	proofs := make([][]byte, 0, len(c.trust.File().LogProofs))
	for _, p := range c.trust.File().LogProofs {
		proofs = append(proofs, p)
	}
	for _, l := range c.links {
		proofs = append(proofs, l.LogProofs...)
	}
	for _, p := range proofs {
		if e, err := tlog.ParseEntry(p); err == nil {
			if signed := is(e); signed != nil {
				return signed
			}
		}
	}
	return nil
}

// stampArchive gets the archive's own token, and one that its readers will take.
func stampArchive(ctx context.Context, a *archive.Archive, urls []string, known []timestamp.Authority) error {
	client := stamping.NewClient()
	defer client.Close()
	progress := cli.NewProgress(os.Stderr)
	defer progress.Done()
	var why error
	for _, url := range urls {
		progress.Printf("asking %s for a timestamp of the archive", url)
		raw, _, err := client.TimestampOf(ctx, url, a.Stamped())
		if err == nil {
			var token *timestamp.Token
			if token, err = timestamp.Parse(raw); err == nil {
				if _, err = token.Verify(a.Stamped(), known); err == nil {
					return a.SetToken(raw)
				}
			}
		}
		why = fmt.Errorf("no token for the archive from %s: %w", url, err)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return why
}

func archiveCheckCommand(clock func() time.Time) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Say what an archive lacks to be verified in ten years",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.archive = args[0]
			return checkArchive(cmd, o, clock())
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.trustKeys, "trust-key", nil, "fingerprint, or `FILE` with the public key, that must have signed its trust.json (repeatable: one of them; default the key seen at first use)")
	f.StringArrayVar(&o.revocations, "revocations", nil, "`FILE` of revocations issued after it was made (repeatable)")
	f.StringVar(&o.state, "trust-state", "", "`FILE` that remembers which key signs trust.json (default in $XDG_STATE_HOME/rootlink)")
	o.predicate = "link"
	return cmd
}

// lack is one thing that an archive does without.
type lack struct {
	What   string `json:"what"`
	Of     string `json:"of,omitempty"` // which link
	Needed bool   `json:"needed"`       // without it the archive does not verify for long
}

func checkArchive(cmd *cobra.Command, o verifyOptions, clock time.Time) error {
	o.checking = true
	q, err := o.prepare(cmd.Context(), clock, nil)
	if err != nil {
		return err
	}
	defer q.placed.remove()
	c, err := o.collect(cmd, q)
	if err != nil {
		return err
	}
	lacks := lacking(q, c)
	if err := printLacks(cmd, q.archive, lacks); err != nil {
		return err
	}
	if slices.ContainsFunc(lacks, func(l lack) bool { return l.Needed }) {
		return cli.Fail(cli.ExitPolicy, fmt.Errorf("%s will not verify for long", o.archive), "make it again with what it lacks, while that can be had")
	}
	return nil
}

func printLacks(cmd *cobra.Command, a *archive.Archive, lacks []lack) error {
	if cli.WantsJSON(cmd) {
		return cli.PrintJSON(cmd.OutOrStdout(), struct {
			Created time.Time `json:"created"`
			Files   int       `json:"files"`
			Lacks   []lack    `json:"lacks"`
		}{a.Manifest.Created, len(a.Manifest.Files), append([]lack{}, lacks...)})
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "verified: %d files, made %s\n", len(a.Manifest.Files), a.Manifest.Created.Format(time.RFC3339))
	for _, l := range lacks {
		mark, of := "–", ""
		if l.Needed {
			mark = "✗"
		}
		if l.Of != "" {
			of = cli.Clean(l.Of) + ": "
		}
		fmt.Fprintf(&b, "  %s %s%s\n", mark, of, l.What)
	}
	if len(lacks) == 0 {
		b.WriteString("  nothing is missing\n")
	}
	_, err := io.Copy(cmd.OutOrStdout(), &b)
	return err
}

// lacking names what is missing in an archive that verifies.
func lacking(q *question, c *contents) (out []lack) {
	a := q.archive
	say := func(needed bool, of, format string, args ...any) {
		out = append(out, lack{What: fmt.Sprintf(format, args...), Of: of, Needed: needed})
	}
	switch {
	case a.Token() == nil:
		say(true, "", "no timestamp of the archive: it cannot be shown that it was made before trust.json expired (%s)", c.trust.Expires().Format(time.RFC3339))
	case q.archived.IsZero():
		say(true, "", "no timestamp by an authority that trust.json names: the archive's token counts for nothing once trust.json has expired (%s)", c.trust.Expires().Format(time.RFC3339))
	}
	if len(a.Manifest.Artifacts) == 0 {
		say(false, "", "no digest of an artifact: a later verifier must have the artifact itself")
	}
	for _, cp := range c.checkpoints {
		if _, ok := a.Find(archive.RoleCheckpoint, checkpointName(cp)); !ok {
			say(false, "", "no checkpoint of log %s at size %d: the log cannot be asked to prove that it only grew since", cp.Origin, cp.Size)
		}
	}
	if len(c.trust.TrustedRoot().Logs) > 0 && len(c.trust.File().LogProofs) == 0 {
		say(false, "", "no log proofs of the SVID authorities and attestation CAs in trust.json: one that was made in secret would not show")
	}
	attested, unstamped := map[string]bool{}, map[string]bool{}
	for i := range c.results {
		r := &c.results[i]
		attested[r.Name] = r.Time.Attested
		unstamped[r.Name] = r.Chain.Detached != nil && !r.Chain.Detached.Attested
	}
	for _, l := range c.links {
		b, err := link.ParseBundle(l.Bundle)
		if err != nil {
			continue // it was verified a moment ago
		}
		_, eventLog, proof := namesBeside(l)
		if at, judged := attested[l.Name]; judged && !at {
			say(true, l.Name, "no attested time: it verifies only until its SVID ends (%s)", b.UnverifiedCertificate().NotAfter.Format(time.RFC3339))
		}
		if unstamped[l.Name] {
			say(true, l.Name, "no attested time in its detached evidence: it verifies only until its SVID ends (%s)", b.UnverifiedCertificate().NotAfter.Format(time.RFC3339))
		}
		if len(b.LogEntries()) == 0 {
			say(false, l.Name, "no entry of a transparency log")
		}
		if p := policyCited(b); p != nil && !slices.ContainsFunc(c.trust.File().PCRPolicies, func(q link.PCRPolicy) bool {
			return q.Name == p.Name && q.Revision == p.Revision
		}) {
			say(false, l.Name, "PCR policy %s revision %d, which the server says was met, is not in trust.json: what it asked cannot be seen", p.Name, p.Revision)
		}
		if _, ok := a.Find(archive.RoleEventLog, eventLog); eventLog != "" && !ok {
			say(false, l.Name, "no boot event log %s: PCR values cannot be explained, only compared", eventLog)
		}
		if _, ok := a.Find(archive.RoleLogProof, proof); proof != "" && !ok {
			say(false, l.Name, "no log proof of the AK certificate (%s): a server that issued it in secret would not show", proof)
		}
	}
	return out
}

// policyCited is the PCR policy that the server says it matched, nil for none.
func policyCited(b *link.Bundle) *attest.PolicyRef {
	c := b.UnverifiedCertificate()
	if e, err := attest.FromCertificate(c); err == nil {
		return e.Policy
	}
	if p, err := attest.ParentFromCertificate(c); err == nil {
		return p.Policy
	}
	return nil
}
