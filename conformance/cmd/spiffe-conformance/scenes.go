package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"

	"github.com/rootlink/rootlink/conformance/suite"
)

const maxFile = 4 << 20 // bytes

var errJWTKey = errors.New("not a private key in PEM")

func (c *config) load(bundles []string, key, without, rotate, withdraw string) error {
	for _, name := range bundles {
		b, err := readFile(name)
		if err != nil {
			return err
		}
		c.Bundles = append(c.Bundles, b)
	}
	if key != "" {
		signer, err := readKey(key)
		if err != nil {
			return err
		}
		c.JWTKey = signer
	}
	if c.expect != "" {
		b, err := readFile(c.expect)
		if err != nil {
			return err
		}
		if c.deviations, err = readDeviations(b); err != nil {
			return fmt.Errorf("%s: %w", c.expect, err)
		}
	}
	if without != "" {
		c.WithoutIdentity = func(ctx context.Context) (suite.Probe, error) {
			out, err := shell(ctx, without+` "$@"`, "probe", "--socket", c.Socket, "--audience", c.Audience)
			if err != nil {
				return nil, fmt.Errorf("--without-identity: %w", err)
			}
			var p suite.Probe
			if err := json.Unmarshal(out, &p); err != nil {
				return nil, fmt.Errorf("--without-identity did not start this program: %w", err)
			}
			return p, nil
		}
	}
	c.TriggerRotation, c.Withdraw = scene(rotate), scene(withdraw)
	return nil
}

func scene(command string) func(context.Context) error {
	if command == "" {
		return nil
	}
	return func(ctx context.Context) error {
		_, err := shell(ctx, command)
		return err
	}
}

// shell runs one of the operator's own commands.
func shell(ctx context.Context, script string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", script, "sh"}, args...)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(errs.Bytes()))
	}
	return out, nil
}

func probe(ctx context.Context, c *config, stdout, stderr io.Writer) int {
	p, err := suite.Ask(ctx, c.Socket, c.Audience)
	if err == nil {
		err = json.NewEncoder(stdout).Encode(p)
	}
	if err != nil {
		fmt.Fprintln(stderr, "spiffe-conformance:", err)
		return exitIO
	}
	return exitOK
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s: over %d bytes", name, maxFile)
	}
	return b, err
}

func readKey(name string) (crypto.Signer, error) {
	b, err := readFile(name)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s: %w", name, errJWTKey)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		if key, err = x509.ParseECPrivateKey(block.Bytes); err != nil {
			return nil, fmt.Errorf("%s: %w", name, errJWTKey)
		}
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: %w", name, errJWTKey)
	}
	return signer, nil
}
