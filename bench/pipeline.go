package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/rootlink/rootlink/bench/figures"
)

const pipelineFiles = 20000

// pipeline: a layout of two steps, with 20,000 materials in the link of each,
// verified by the command line. Once with our bundles, back to the TPM, and
// once with classic links by a pinned key, which in-toto-golang judges too: the
// same layout file and the same links.
func pipeline(ctx context.Context, b *bench) error {
	dir := b.path("pipeline")
	defer os.RemoveAll(dir)
	if err := makeSources(filepath.Join(dir, "src")); err != nil {
		return err
	}
	for _, name := range []string{"stamp", "hello"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			return err
		}
	}
	for _, name := range []string{"owner", "worker"} {
		if err := writeKeyPair(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := b.enrolStep(ctx); err != nil {
		return err
	}
	ours, err := b.pipelineOfBundles(ctx, dir)
	if err != nil {
		return err
	}
	rounds := 2*b.runs + 1
	program, missing := peerProgram("in-toto-golang")
	var same, peer []string
	if missing == nil {
		if same, peer, err = b.pipelineOfLinks(ctx, dir, program); err != nil {
			return err
		}
	}
	var bundled, classic, theirs, bundledCPU, classicCPU, theirCPU figures.Samples
	var memory, theirMemory int64
	for range rounds {
		r, err := b.in(ctx, dir, ours...)
		if err != nil {
			return err
		}
		bundled, bundledCPU, memory = append(bundled, r.took), append(bundledCPU, r.cpu), max(memory, r.peak)
		if missing != nil {
			continue
		}
		if r, err = b.in(ctx, dir, same...); err != nil {
			return err
		}
		classic, classicCPU = append(classic, r.took), append(classicCPU, r.cpu)
		if r, err = b.in(ctx, dir, peer...); err != nil {
			return err
		}
		theirs, theirCPU, theirMemory = append(theirs, r.took), append(theirCPU, r.cpu), max(theirMemory, r.peak)
	}
	b.out.Most("verify a layout, two links of 20,000 artifacts", bundled, 0,
		fmt.Sprintf("rootlink verify as a process, bundles with TPM evidence; CPU time %s; peak memory %s", figures.Short(bundledCPU.Median()), figures.Bytes(memory)))
	if missing != nil {
		b.out.Line("the same by in-toto-golang verify", "not measured", "", missing.Error())
		return nil
	}
	b.out.Times("the same by in-toto-golang verify", theirs, 3, bundled, fmt.Sprintf("pinned keys; CPU time %s; peak memory %s", figures.Short(theirCPU.Median()), figures.Bytes(theirMemory)))
	b.out.Most("rootlink verify of its very links and layout", classic, 0,
		fmt.Sprintf("in-toto-golang: %.1f × this; CPU time %s", float64(theirs.Median())/float64(classic.Median()), figures.Short(classicCPU.Median())))
	return nil
}

// in runs a command of the pipeline in its directory.
func (b *bench) in(ctx context.Context, dir string, args ...string) (*run, error) {
	return timed(exec.CommandContext(ctx, args[0], args[1:]...), dir,
		"SPIFFE_ENDPOINT_SOCKET=unix://"+b.socket(), "XDG_STATE_HOME="+b.path("state"))
}

func makeSources(dir string) error {
	for i := range pipelineFiles {
		d := filepath.Join(dir, fmt.Sprintf("dir%03d", i%200))
		if i < 200 {
			if err := os.MkdirAll(d, 0o700); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(d, fmt.Sprintf("file%05d.go", i)), fmt.Append(nil, i), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// writeKeyPair writes an Ed25519 key as path.pem and its public half as path.pub.
func writeKeyPair(path string) error {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600); err != nil {
		return err
	}
	return os.WriteFile(path+".pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o600)
}

// makeLayout writes a signed layout whose steps are done by whom by says.
func (b *bench) makeLayout(ctx context.Context, dir, name, form string, by ...string) error {
	rootlink, file := b.program("rootlink"), name+".layout"
	step := func(name, materials, product string) []string {
		args := append([]string{rootlink, "layout", "add-step", file, "--name", name}, by...)
		return append(args, "--expect-materials", materials, "--expect-products", "CREATE "+product)
	}
	for _, args := range [][]string{
		{rootlink, "layout", "new", "--name", name},
		step("fetch", "ALLOW src*", "stamp"),
		step("build", "MATCH src* WITH MATERIALS FROM fetch", "hello"),
		{rootlink, "layout", "sign", file, "--key", "owner.pem", "--form", form},
	} {
		if _, err := b.in(ctx, dir, args...); err != nil {
			return err
		}
	}
	return nil
}

// pipelineOfBundles makes both steps by `rootlink run`, and returns the command
// that verifies them.
func (b *bench) pipelineOfBundles(ctx context.Context, dir string) (verify []string, err error) {
	t, err := tool()
	if err != nil {
		return nil, err
	}
	for step, product := range map[string]string{"fetch": "stamp", "build": "hello"} {
		if _, err := b.in(ctx, dir, b.program("rootlink"), "run", "--step", step, "--bundle-out", step+".sigstore.json",
			"--materials", "src", "--products", product, "--", t); err != nil {
			return nil, err
		}
	}
	if err := b.makeLayout(ctx, dir, "ours", "dsse", "--identity", "spiffe://"+trustDomain+stepPath); err != nil {
		return nil, err
	}
	_, key, err := b.exportTrust(ctx, filepath.Join(dir, "trust.json"), "--layout-key", "owner="+filepath.Join(dir, "owner.pub"))
	if err != nil {
		return nil, err
	}
	return append(b.verifyLayout(key, "ours"), "fetch.sigstore.json", "build.sigstore.json", "hello"), nil
}

func (b *bench) verifyLayout(trustKey, name string) []string {
	return []string{b.program("rootlink"), "verify", "--trust", "trust.json", "--trust-key", trustKey, "--layout", name + ".layout"}
}

// pipelineOfLinks has the peer record both steps with a key, and returns the
// commands that verify them: ours and the peer's.
func (b *bench) pipelineOfLinks(ctx context.Context, dir, peer string) (ours, theirs []string, err error) {
	t, err := tool()
	if err != nil {
		return nil, nil, err
	}
	for step, product := range map[string]string{"fetch": "stamp", "build": "hello"} {
		if _, err := b.in(ctx, dir, peer, "run", "--name", step, "--key", "worker.pem", "--materials", "src", "--products", product, "--", t); err != nil {
			return nil, nil, err
		}
	}
	links, err := filepath.Glob(filepath.Join(dir, "*.link"))
	if err != nil || len(links) != 2 {
		return nil, nil, fmt.Errorf("in-toto-golang wrote %d links: %w", len(links), err)
	}
	if err := b.makeLayout(ctx, dir, "pinned", "metablock", "--key-pinned", "--functionary-key", "worker.pub"); err != nil {
		return nil, nil, err
	}
	_, key, err := b.exportTrust(ctx, filepath.Join(dir, "trust.json"), "--layout-key", "owner="+filepath.Join(dir, "owner.pub"))
	if err != nil {
		return nil, nil, err
	}
	ours = append(append(b.verifyLayout(key, "pinned"), links...), "hello")
	return ours, []string{peer, "verify", "--layout", "pinned.layout", "--layout-keys", "owner.pub", "--link-dir", "."}, nil
}

// exportTrust writes trust.json and returns it with the fingerprint of the key
// that signed it.
func (b *bench) exportTrust(ctx context.Context, out string, args ...string) (raw []byte, key string, err error) {
	args = append([]string{"trust", "export", "--out", out, "--admin-socket", b.path("admin.sock")}, args...)
	if text, err := exec.CommandContext(ctx, b.program("rootlink-server"), args...).CombinedOutput(); err != nil {
		return nil, "", fmt.Errorf("trust export: %w\n%s", err, text)
	}
	text, err := exec.CommandContext(ctx, b.program("rootlink-server"), "trust", "key", "--data-dir", b.path("server"), "--admin-socket", b.path("admin.sock")).Output()
	if err != nil {
		return nil, "", fmt.Errorf("trust key: %w", err)
	}
	raw, err = os.ReadFile(out)
	return raw, fingerprint.FindString(string(text)), err
}
