// Command sigstore verifies a bundle with sigstore-go, newer than the one inside
// cosign: it rebuilds the log entry from the bundle instead of comparing parts.
//
//	sigstore --bundle FILE --trusted-root FILE --identity SPIFFE-ID [--log] [--timestamps N] ARTIFACT
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
)

func main() {
	bundleFile := flag.String("bundle", "", "")
	rootFile := flag.String("trusted-root", "", "")
	identity := flag.String("identity", "", "")
	log := flag.Bool("log", false, "demand an inclusion proof of a known log")
	timestamps := flag.Int("timestamps", 0, "demand so many authorities' tokens; 0: judge at the clock's time")
	flag.Parse()
	if err := judge(*bundleFile, *rootFile, *identity, flag.Arg(0), *log, *timestamps); err != nil {
		fmt.Fprintln(os.Stderr, "sigstore:", err)
		os.Exit(1)
	}
	fmt.Println("sigstore: verified")
}

func judge(bundleFile, rootFile, identity, artifact string, log bool, timestamps int) error {
	if identity == "" || artifact == "" {
		return errors.New("an identity and an artifact are needed")
	}
	b, err := bundle.LoadJSONFromPath(bundleFile)
	if err != nil {
		return err
	}
	trusted, err := root.NewTrustedRootFromPath(rootFile)
	if err != nil {
		return err
	}
	// No SCTs: these certificates are not Fulcio's.
	var options []verify.VerifierOption
	if log {
		options = append(options, verify.WithTransparencyLog(1))
	}
	if timestamps > 0 {
		options = append(options, verify.WithSignedTimestamps(timestamps))
	} else {
		options = append(options, verify.WithCurrentTime())
	}
	v, err := verify.NewVerifier(trusted, options...)
	if err != nil {
		return err
	}
	id, err := verify.NewShortCertificateIdentity("", ".*", identity, "")
	if err != nil {
		return err
	}
	f, err := os.Open(artifact)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = v.Verify(b, verify.NewPolicy(verify.WithArtifact(f), verify.WithCertificateIdentity(id)))
	return err
}
