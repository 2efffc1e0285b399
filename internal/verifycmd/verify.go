// Package verifycmd is the command line of the verifier: `rootlink verify` and
// `rootlink inspect`. It reads files, asks pkg/link, and prints.
package verifycmd

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/tlog"
	"github.com/rootlink/rootlink/pkg/vsa"
)

type verifyOptions struct {
	trust, state, identity string
	pipeline               layoutOptions
	revocations, trustKeys []string
	notBefore, at          string
	predicate              string
	archive                string
	checking               bool // archive check: what its maker accepted counts
	from                   []string
	plainHTTP              bool
	report                 string
	vsa                    vsaOptions
	verbose                bool
}

// VerifyCommand returns `rootlink verify`.
func VerifyCommand() *cobra.Command { return verifyCommand(time.Now) }

func verifyCommand(clock func() time.Time) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify --trust FILE (--identity PATTERN | --layout FILE) BUNDLE... [ARTIFACT...]",
		Short: "Verify links, and artifacts against them, back to the TPM",
		Long: `Verify links, and artifacts against them, back to the TPM. No server and no
network are needed: trust.json says whom to believe.

Every BUNDLE must verify, and every ARTIFACT (a file, or a directory recorded as
one dirHash) must be a product of one of them. An ARTIFACT may also be an image,
as oci-layout:DIR[@sha256:…] or oci:HOST/REPOSITORY[:TAG][@sha256:…]. Arguments
that end in ` + link.BundleSuffix + ` are bundles. When none does, the one that is a
Sigstore bundle by its mediaType is.

PATTERN is a SPIFFE ID. In it * stands for any characters within one path
segment, and ** as the last segment for one or more whole segments.

Exit codes: 0 verified, 1 a file could not be read or written, 2 usage, 3 a
cryptographic check failed, 4 a policy was not met.`,
		Example: `  rootlink verify --trust trust.json --identity 'spiffe://example.org/build/*' \
      hello` + link.BundleSuffix + ` hello`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error { return verify(cmd, o, clock(), args) },
	}
	f := cmd.Flags()
	o.register(f)
	f.StringVar(&o.archive, "archive", "", "judge the `FILE` that rootlink archive wrote: it brings bundles, layout and trust.json")
	f.StringVar(&o.at, "at", "", "judge as if it were this `TIME` (RFC 3339); the result says so, and nothing is remembered of it")
	f.StringVar(&o.report, "report", "", "also write the result as one self-contained HTML page to this `FILE`")
	o.vsa.register(f)
	f.BoolVar(&o.verbose, "verbose", false, "list every check, also those that passed")
	return cmd
}

// register are the flags of every command that verifies.
func (o *verifyOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.trust, "trust", "", "trust.json: the `FILE` that rootlink-server trust export writes")
	f.StringVar(&o.identity, "identity", "", "SPIFFE ID, or `PATTERN` of it, that must have signed")
	f.StringVar(&o.predicate, "type", "link", "predicate `TYPE` of the statements, a URI or one of "+strings.Join(link.PredicateAliases(), ", "))
	o.pipeline.register(f)
	f.StringVar(&o.state, "trust-state", "", "`FILE` that remembers the highest serial of trust.json (default in $XDG_STATE_HOME/rootlink)")
	f.StringArrayVar(&o.trustKeys, "trust-key", nil, "fingerprint, or `FILE` with the public key, that must have signed trust.json (repeatable: one of them; default the key seen at first use)")
	f.StringArrayVar(&o.revocations, "revocations", nil, "`FILE` of revocations issued after trust.json (repeatable)")
	f.StringVar(&o.notBefore, "not-before", "", "refuse links made before this `TIME` (RFC 3339): genuine ones of an older run")
	f.StringArrayVar(&o.from, "from", nil, "`REF` of an image whose bundles, stored by rootlink attach, and whose digest are judged too (repeatable)")
	f.BoolVar(&o.plainHTTP, "plain-http", false, "talk to registries without TLS")
}

func (o verifyOptions) check(args []string) (notBefore time.Time, err error) {
	switch {
	case o.trust == "":
		return notBefore, cli.Usage("--trust FILE names it; `rootlink-server trust export` writes it", "no trust.json: nobody to believe")
	case o.identity == "" && o.pipeline.file == "":
		return notBefore, cli.Usage("--identity 'spiffe://…' says who must have signed", "neither --identity nor --layout: any enrolled signer would do")
	case len(args)+len(o.from) == 0:
		return notBefore, cli.Usage("name the "+link.BundleSuffix+" file that `rootlink run` wrote", "no bundle to verify")
	}
	if err := o.vsa.check(); err != nil {
		return notBefore, err
	}
	if err := o.pipeline.check(o.identity); err != nil {
		return notBefore, err
	}
	if err := link.ValidatePattern(o.identity); err != nil && o.pipeline.file == "" {
		return notBefore, cli.Usage("such as spiffe://example.org/build/*", "--identity: %w", err)
	}
	if o.notBefore != "" {
		if notBefore, err = time.Parse(time.RFC3339, o.notBefore); err != nil {
			return notBefore, cli.Usage("such as 2030-05-01T12:00:00Z", "--not-before: %w", err)
		}
	}
	return notBefore, nil
}

func fingerprints(args []string) (out []string, err error) {
	for _, a := range args {
		id, err := keyfile.Fingerprint(a)
		if err != nil {
			return nil, err
		}
		out = append(out, id)
	}
	return out, nil
}

func verify(cmd *cobra.Command, o verifyOptions, clock time.Time, args []string) error {
	q, err := o.prepare(cmd.Context(), clock, args)
	if err != nil {
		return err
	}
	defer q.placed.remove()
	for _, n := range q.notes {
		fmt.Fprintln(cmd.ErrOrStderr(), "rootlink: NOTE: "+cli.Clean(n))
	}
	if o.pipeline.file != "" {
		return verifyPipeline(cmd, o, q)
	}
	j, verdict := judgeLinks(&o, q)
	if j == nil {
		return verdict
	}
	res, now := j.Result, q.now
	if err := writeReport(o.report, res, nil, now); err != nil {
		return err
	}
	if err := o.vsa.write(res, vsa.Digest(filepath.Base(o.trust), j.doc), j.Input.Links, now); err != nil {
		return err
	}
	switch {
	case cli.WantsJSON(cmd):
		err = cli.PrintJSON(cmd.OutOrStdout(), res)
	case o.verbose:
		_, err = fmt.Fprint(cmd.OutOrStdout(), res.VerboseText())
	case verdict != nil:
		_, err = fmt.Fprint(cmd.OutOrStdout(), res.Text(), "--verbose lists them.\n")
	default:
		_, err = fmt.Fprint(cmd.OutOrStdout(), res.Text())
	}
	if err != nil {
		return err
	}
	return outcome(res, verdict)
}

// outcome gives a verdict its exit code and hint.
func outcome(res *link.Result, err error) error {
	if err == nil {
		return nil
	}
	code := cli.ExitInternal
	switch {
	case errors.Is(err, link.ErrCrypto):
		code = cli.ExitCrypto
	case errors.Is(err, link.ErrPolicy):
		code = cli.ExitPolicy
	}
	return cli.Fail(code, fmt.Errorf("not verified: %w", err), hint(res.Failure, err))
}

// hint says what to do about a failed check.
func hint(f *link.Failure, err error) string {
	if errors.Is(err, link.ErrExpired) {
		if f.Check == "svid.validity" && strings.Contains(f.Message, "before the link was signed") {
			return "the step has to run again: it was signed after its SVID had ended"
		}
		return "the link has no timestamp, and needed one while its SVID was valid (`rootlink stamp`): the step has to run again"
	}
	if errors.Is(err, link.ErrNotYetValid) {
		return "check this machine's clock, and that of the one that issued it"
	}
	if errors.Is(err, link.ErrIntermediate) {
		return "list the intermediate authority itself in trust.json: a SPIRE server with an UpstreamAuthority issues through one"
	}
	if errors.Is(err, attest.ErrBoot) {
		return "the machine was rebooted, or suspended, between its attestation and the quote: its agent has to attest again, and the step to run again"
	}
	if errors.Is(err, attest.ErrEKDenied) {
		return "trust.json has shut this TPM out: do not use what it made, and ask whoever wrote trust.json why"
	}
	switch f.Check {
	case "evidence.mapping":
		return "name the nodes that may speak for this identity: eks or pcr_policies of its requirement in trust.json"
	case "evidence.time":
		return "the record's token was changed, or taken from elsewhere: get the record again from where it was made"
	case "evidence.time_known":
		return "sign with a timestamp authority that trust.json names, while the SVID is valid: the step has to run again"
	case "statement.type":
		return "--type says which kind of statement is expected; `rootlink inspect` shows which it is"
	case "requirement.type":
		return "when this identity is to sign such statements: rootlink-server trust export --allow-type ID=TYPE"
	case "trust.window":
		return "export a new trust.json: rootlink-server trust export"
	case "trust.signature":
		return "get trust.json again from whoever runs the trust domain; if its key was changed on purpose, pin the new one with --trust-key (`rootlink-server trust key` prints it)"
	case "trust.history":
		return "somebody is shown another trust.json than you: ask whoever runs the trust domain which one is right"
	case "time.tokens":
		return "the token was changed, or taken from elsewhere: get the bundle again from where it was made"
	case "time.log_entries", "log.proofs":
		if errors.Is(err, tlog.ErrFork) {
			return "the log shows different people different trees: keep this bundle and the trust state, and ask its operator"
		}
		return "the log entry was changed, or taken from elsewhere: get the bundle again from where it was made"
	case "time.known":
		return "export a trust.json that knows this timestamp authority or log: rootlink-server trust export"
	case "time.agreement":
		return "one of those who attest the time is wrong or lies: `rootlink verify --verbose` shows what each says"
	case "time.authorities":
		return "a token must be had while the SVID is valid (`rootlink stamp`): the step has to run again with enough --timestamp-url"
	case "time.nonce":
		return "the clocks of timestamp authority and server disagree, or the link was put together from others"
	case "requirement.logged":
		return "the proof lies beside the bundle, or in the bundle, or in trust.json: get them again from where they were made, or export trust.json again"
	case "trust.serial":
		return "use the newest trust.json; if the server was set up anew on purpose, name another --trust-state"
	case "svid.profile":
		return "is this the trust.json of the signer's trust domain? rootlink inspect shows who signed"
	case "revocation":
		return "do not use what it made; make it again with tools and machines that are trusted"
	case "bundle.form":
		return "this is not, or not all of, what `rootlink run` wrote: get it again from where it was made; `rootlink inspect FILE` shows what a file holds"
	case "svid.authority":
		return "the trust.json may be older than the authority that signed: export a new one"
	case "requirement.match":
		return "create the entry for this identity and export trust.json again, or check whose trust.json it is"
	case "evidence.kind":
		if strings.Contains(f.Message, "the requirement wants") {
			return "trust.json asks for more of this identity: sign on a rootlink-server, or lower `evidence` of its requirement if that is meant"
		}
		return "sign with `rootlink run` on an attested machine: an SVID made by hand proves nothing about one. Of a stock SPIRE server, the record sha256-….evidence.cbor belongs beside the bundle"
	case "requirement.executables":
		return "`rootlink inspect --executables BUNDLE` lists what ran; what may run is demanded by `rootlink-server trust export --executables`"
	case "requirement.caches":
		return "run the step with caches of its own, such as GOCACHE=$(mktemp -d) GOMODCACHE=$(mktemp -d)"
	case "requirement.tools":
		return "register the tool's hash with an entry and export trust.json again, if that is the tool you meant"
	case "requirement.recorder":
		return "install rootlink setgid to its own group, or accept the unprotected recorder in the entry"
	case "requirement.pcr_policy":
		return "if the machine was updated on purpose, capture its new state: rootlink-server pcr-policy capture"
	case "ek.inventory", "requirement.ek":
		return "the machine is not one of those in trust.json: enrol it, or find out whose it is"
	case "identity":
		return "someone else signed: check --identity and the bundle"
	case "freshness":
		return "the link is of an older run: ask for the one of this run"
	case "step.exit_code":
		return "the step failed; its products are not what it should have made"
	case "artifact.subject":
		return "the file was changed, or is not what this step made"
	}
	if errors.Is(err, link.ErrCrypto) {
		return "the bundle was changed, or put together from others: get it again from where it was made"
	}
	return "docs/verify.md says what each check demands"
}
