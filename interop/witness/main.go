// Command witness is Witness's own code (go-witness) under Witness's own flags:
// its runner with its SPIFFE signer and RFC 3161 client, and its policy verifier.
// It is put together from go-witness's packages as the witness command is, whose
// module does not resolve.
//
//	witness run --step NAME --signer-spiffe-socket-path ADDR [--timestamp-servers URL] --outfile FILE -- COMMAND…
//	witness sign --signer-file-key-path PEM --infile FILE --outfile FILE
//	witness verify --policy FILE --publickey PEM --attestations FILE --artifactfile FILE
package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
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
	"github.com/in-toto/go-witness/signer/file"
	"github.com/in-toto/go-witness/signer/spiffe"
	"github.com/in-toto/go-witness/source"
	"github.com/in-toto/go-witness/timestamp"
)

func main() {
	commands := map[string]func([]string) error{"run": run, "sign": sign, "verify": verify}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: witness run|sign|verify …")
		os.Exit(2)
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "witness:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	fs := flag.NewFlagSet("run", flag.ExitOnError)
	socket := fs.String("signer-spiffe-socket-path", "", "")
	tsa := fs.String("timestamp-servers", "", "")
	step := fs.String("step", "", "")
	out := fs.String("outfile", "", "")
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

func sign(args []string) error {
	fs := flag.NewFlagSet("sign", flag.ExitOnError)
	key := fs.String("signer-file-key-path", "", "")
	in := fs.String("infile", "", "")
	out := fs.String("outfile", "", "")
	_ = fs.Parse(args)
	signer, err := file.New(file.WithKeyPath(*key)).Signer(context.Background())
	if err != nil {
		return err
	}
	payload, err := os.ReadFile(*in)
	if err != nil {
		return err
	}
	envelope, err := dsse.Sign(policy.PolicyPredicate, bytes.NewReader(payload), dsse.SignWithSigners(signer))
	if err != nil {
		return err
	}
	return write(*out, envelope)
}

// verify does what go-witness's policyverify does.
func verify(args []string) error {
	fs := flag.NewFlagSet("verify", flag.ExitOnError)
	policyFile := fs.String("policy", "", "")
	publicKey := fs.String("publickey", "", "")
	attestations := fs.String("attestations", "", "")
	artifactFile := fs.String("artifactfile", "", "")
	_ = fs.Parse(args)
	artifact, err := os.ReadFile(*artifactFile)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(artifact)

	p, err := openPolicy(*policyFile, *publicKey)
	if err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	trust, err := p.TrustBundles()
	if err != nil {
		return err
	}
	var roots, intermediates []*x509.Certificate
	for _, b := range trust {
		roots, intermediates = append(roots, b.Root), append(intermediates, b.Intermediates...)
	}
	tsas, err := p.TimestampAuthorityTrustBundles()
	if err != nil {
		return err
	}
	var clocks []timestamp.TimestampVerifier
	for _, b := range tsas {
		clocks = append(clocks, timestamp.NewVerifier(timestamp.VerifyWithCerts(append(b.Intermediates, b.Root))))
	}
	options := []dsse.VerificationOption{
		dsse.VerifyWithRoots(roots...), dsse.VerifyWithIntermediates(intermediates...), dsse.VerifyWithTimestampVerifiers(clocks...),
	}
	memory := source.NewMemorySource()
	if err := memory.LoadFile(*attestations); err != nil {
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

func openPolicy(policyFile, publicKey string) (p policy.Policy, err error) {
	raw, err := os.ReadFile(policyFile)
	if err != nil {
		return p, err
	}
	var envelope dsse.Envelope
	if err := json.Unmarshal(raw, &envelope); err != nil {
		return p, err
	}
	key, err := os.Open(publicKey)
	if err != nil {
		return p, err
	}
	defer key.Close()
	owner, err := cryptoutil.NewVerifierFromReader(key)
	if err != nil {
		return p, err
	}
	if _, err := envelope.Verify(dsse.VerifyWithVerifiers(owner)); err != nil {
		return p, err
	}
	return p, json.Unmarshal(envelope.Payload, &p)
}

func write(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o600)
}
