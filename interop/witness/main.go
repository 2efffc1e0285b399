// Command witness is Witness's own code (go-witness) under a small command line:
// its runner with its SPIFFE signer and RFC 3161 client, and its policy verifier.
// It is put together from go-witness's packages as `witness run` and `witness
// verify` do it.
//
//	witness run --spiffe-socket ADDR [--timestamp-url URL] --step NAME --out FILE -- COMMAND…
//	witness policy --root PEM [--tsa-root PEM] --uri SPIFFE-ID --step NAME --out FILE
//	witness verify --policy FILE --attestation FILE ARTIFACT
package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/in-toto/go-witness/attestation"
	"github.com/in-toto/go-witness/attestation/commandrun"
	"github.com/in-toto/go-witness/attestation/material"
	"github.com/in-toto/go-witness/attestation/product"
	"github.com/in-toto/go-witness/cryptoutil"
	"github.com/in-toto/go-witness/dsse"
	"github.com/in-toto/go-witness/intoto"
	"github.com/in-toto/go-witness/policy"
	"github.com/in-toto/go-witness/signer/spiffe"
	"github.com/in-toto/go-witness/source"
	"github.com/in-toto/go-witness/timestamp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func main() {
	commands := map[string]func([]string) error{"run": run, "policy": makePolicy, "verify": verify}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: witness run|policy|verify …")
		os.Exit(2)
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "witness:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	fs := flag.NewFlagSet("run", flag.ExitOnError)
	socket := fs.String("spiffe-socket", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "")
	tsa := fs.String("timestamp-url", "", "")
	step := fs.String("step", "", "")
	out := fs.String("out", "", "")
	_ = fs.Parse(args)

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	signer, err := spiffe.New(spiffe.WithSocketPath(*socket)).Signer(ctx)
	if err != nil {
		return fmt.Errorf("SPIFFE signer: %w", err)
	}
	cr := commandrun.New(commandrun.WithCommand(fs.Args()), commandrun.WithSilent(true))
	runCtx, err := attestation.NewContext(*step, []attestation.Attestor{material.New(), cr, product.New()},
		attestation.WithContext(ctx), attestation.WithHashes([]cryptoutil.DigestValue{{Hash: crypto.SHA256}}))
	if err != nil {
		return err
	}
	if err := runCtx.RunAttestors(); err != nil {
		return err
	}
	for _, a := range runCtx.CompletedAttestors() {
		if a.Error != nil {
			return fmt.Errorf("%s: %w", a.Attestor.Name(), a.Error)
		}
	}
	collection := attestation.NewCollection(*step, runCtx.CompletedAttestors())
	predicate, err := json.Marshal(&collection)
	if err != nil {
		return err
	}
	statement, err := intoto.NewStatement(attestation.CollectionType, predicate, collection.Subjects())
	if err != nil {
		return err
	}
	payload, err := json.Marshal(&statement)
	if err != nil {
		return err
	}
	options := []dsse.SignOption{dsse.SignWithSigners(signer)}
	if *tsa != "" {
		options = append(options, dsse.SignWithTimestampers(timestamp.NewTimestamper(timestamp.TimestampWithUrl(*tsa))))
	}
	envelope, err := dsse.Sign(intoto.PayloadType, bytes.NewReader(payload), options...)
	if err != nil {
		return err
	}
	return write(*out, envelope)
}

// makePolicy writes a policy of one step whose functionary is the holder of a
// certificate with that URI under that root.
func makePolicy(args []string) error {
	fs := flag.NewFlagSet("policy", flag.ExitOnError)
	root := fs.String("root", "", "")
	tsaRoot := fs.String("tsa-root", "", "")
	uri := fs.String("uri", "", "")
	step := fs.String("step", "", "")
	out := fs.String("out", "", "")
	_ = fs.Parse(args)

	ca, err := os.ReadFile(*root)
	if err != nil {
		return err
	}
	const any = policy.AllowAllConstraint
	p := policy.Policy{
		Expires: metav1.NewTime(time.Now().Add(time.Hour)),
		Roots:   map[string]policy.Root{"authority": {Certificate: ca}},
		Steps: map[string]policy.Step{*step: {
			Name: *step,
			Functionaries: []policy.Functionary{{Type: "root", CertConstraint: policy.CertConstraint{
				Roots: []string{"authority"}, URIs: []string{*uri},
				CommonName: any, DNSNames: []string{any}, Emails: []string{any}, Organizations: []string{any},
			}}},
			Attestations: []policy.Attestation{{Type: commandrun.Type}, {Type: product.ProductType}},
		}},
	}
	if *tsaRoot != "" {
		tsa, err := os.ReadFile(*tsaRoot)
		if err != nil {
			return err
		}
		p.TimestampAuthorities = map[string]policy.Root{"tsa": {Certificate: tsa}}
	}
	return write(*out, p)
}

// verify is what go-witness's policyverify does once the policy's own signature
// is found good.
func verify(args []string) error {
	fs := flag.NewFlagSet("verify", flag.ExitOnError)
	policyFile := fs.String("policy", "", "")
	file := fs.String("attestation", "", "")
	_ = fs.Parse(args)
	artifact, err := os.ReadFile(fs.Arg(0))
	if err != nil {
		return err
	}
	digest := sha256.Sum256(artifact)

	raw, err := os.ReadFile(*policyFile)
	if err != nil {
		return err
	}
	var p policy.Policy
	if err := json.Unmarshal(raw, &p); err != nil {
		return err
	}
	trust, err := p.TrustBundles()
	if err != nil {
		return err
	}
	var options []dsse.VerificationOption
	for _, b := range trust {
		options = append(options, dsse.VerifyWithRoots(b.Root), dsse.VerifyWithIntermediates(b.Intermediates...))
	}
	tsas, err := p.TimestampAuthorityTrustBundles()
	if err != nil {
		return err
	}
	for _, b := range tsas {
		options = append(options, dsse.VerifyWithTimestampVerifiers(timestamp.NewVerifier(timestamp.VerifyWithCerts(append(b.Intermediates, b.Root)))))
	}
	memory := source.NewMemorySource()
	if err := memory.LoadFile(*file); err != nil {
		return err
	}
	accepted, steps, err := p.Verify(context.Background(),
		policy.WithVerifiedSource(source.NewVerifiedSource(memory, options...)),
		policy.WithSubjectDigests([]string{fmt.Sprintf("%x", digest)}))
	if err != nil {
		return err
	}
	if !accepted {
		errs := []error{errors.New("the policy is not met")}
		for _, s := range steps {
			for _, r := range s.Rejected {
				errs = append(errs, r.Reason)
			}
		}
		return errors.Join(errs...)
	}
	fmt.Println("witness: accepted")
	return nil
}

func write(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o600)
}
