package keeper

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/ekfiles"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/strictjson"
)

// Limits of the operator's files, in bytes.
const (
	maxPEMFile      = 1 << 20
	maxRequirements = 4 << 20
)

// inputs is what the operator's files say now.
type inputs struct {
	cas          []*x509.Certificate
	ek           attest.EKRoots
	inventory    map[string]string
	policies     []attest.PCRPolicy
	tsas         []trustdoc.TSA
	requirements []link.Requirement
	layoutKeys   []link.LayoutKey
	revocations  []byte

	keys    []crypto.PublicKey
	signers []crypto.Signer // none of an unsigned file
	ids     []string        // fingerprints of keys
}

// read reads every file. Those that others still have to write, such as the
// attestation CA's at the first start, are fs.ErrNotExist.
func (c *Config) read() (in *inputs, err error) {
	in = new(inputs)
	for _, path := range c.AttestationCAs {
		list, err := certificates(path)
		if err != nil {
			return nil, fmt.Errorf("attestation_ca_certs: %w", err)
		}
		in.cas = append(in.cas, list...)
	}
	for _, path := range c.EKRoots {
		if err := ekfiles.AddRoots(&in.ek, path); err != nil {
			return nil, err
		}
	}
	if in.ek.Allow, err = ekfiles.ReadHashes("ek_allow", c.EKAllow); err != nil {
		return nil, err
	}
	if in.ek.Deny, err = ekfiles.ReadHashes("ek_deny", c.EKDeny); err != nil {
		return nil, err
	}
	if in.inventory, err = ekfiles.ReadInventory("ek_inventory", c.EKInventory); err != nil {
		return nil, err
	}
	if c.PCRPolicies != "" {
		if in.policies, err = policy.ReadFile(c.PCRPolicies); err != nil {
			return nil, err
		}
	}
	if in.tsas, err = c.readTSAs(); err != nil {
		return nil, err
	}
	if in.requirements, err = c.readRequirements(); err != nil {
		return nil, err
	}
	for _, arg := range c.LayoutKeys {
		name, path, ok := strings.Cut(arg, "=")
		if !ok {
			path = arg
			name = strings.TrimSuffix(filepath.Base(arg), filepath.Ext(arg))
		}
		pub, err := keyfile.Public(path)
		if err != nil {
			return nil, fmt.Errorf("layout_keys: %w", err)
		}
		der, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			return nil, fmt.Errorf("layout_keys: %w", err)
		}
		in.layoutKeys = append(in.layoutKeys, link.LayoutKey{Name: name, Key: der})
	}
	if c.Revocations != "" {
		if in.revocations, err = files.Read(c.Revocations, link.MaxTrustFile); err != nil {
			return nil, fmt.Errorf("revocations: %w", err)
		}
	}
	return in, nil
}

func certificates(path string) (out []*x509.Certificate, err error) {
	rest, err := files.Read(path, maxPEMFile)
	if err != nil {
		return nil, err
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: unexpected PEM block %q", path, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM", path)
	}
	return out, nil
}

func (c *Config) readTSAs() (out []trustdoc.TSA, err error) {
	for _, arg := range c.TSAChains {
		path, opts, err := trustdoc.FileOptions(arg, "operator", "uri")
		if err != nil {
			return nil, fmt.Errorf("tsa_chains: %w", err)
		}
		text, err := files.Read(path, maxPEMFile)
		if err != nil {
			return nil, fmt.Errorf("tsa_chains: %w", err)
		}
		chains, err := trustdoc.Chains(text)
		if err != nil {
			return nil, fmt.Errorf("tsa_chains: %s: %w", path, err)
		}
		for _, chain := range chains {
			out = append(out, trustdoc.TSA{Chain: chain, Operator: opts["operator"], URI: opts["uri"]})
		}
	}
	return out, new(trustdoc.Sources).Merge(trustdoc.Sources{Timestamps: out})
}

func (c *Config) readRequirements() (out []link.Requirement, err error) {
	b, err := files.Read(c.Requirements, maxRequirements)
	if err != nil {
		return nil, fmt.Errorf("requirements: %w", err)
	}
	// Unknown and duplicate keys are errors: a misspelt one demands nothing.
	if err := strictjson.Decode(b, maxRequirements, "none", &out); err != nil {
		return nil, cli.Hint(fmt.Errorf("requirements: %s: %w", c.Requirements, err), "it is a JSON list of requirements, as in trust.json (docs/verify.md)")
	}
	for i, r := range out {
		// Any enrolled node could vouch for anyone's SVID otherwise.
		if r.Evidence == link.EvidenceDetached && len(r.EKs)+len(r.PCRPolicies) == 0 {
			return nil, cli.Hint(fmt.Errorf("requirements: %s: requirement %d (%s): detached evidence from any node of the fleet", c.Requirements, i, r.Identity),
				"name the nodes that this identity runs on: eks or pcr_policies")
		}
	}
	return out, nil
}

// readKeys reads the trust keys. The one in data_dir is made with create.
func (c *Config) readKeys(in *inputs, create bool) error {
	paths := c.TrustKeys
	switch {
	case c.Unsigned:
		for _, path := range c.TrustKeysPublic {
			pub, err := keyfile.Public(path)
			if err != nil {
				return fmt.Errorf("trust_key_public: %w", err)
			}
			in.keys = append(in.keys, pub)
		}
	case len(paths) == 0:
		s, err := ownKey(filepath.Join(c.DataDir, "trust.key"), create)
		if err != nil || s == nil {
			return err
		}
		in.signers, in.keys = []crypto.Signer{s}, []crypto.PublicKey{s.Public()}
	}
	for _, path := range paths {
		s, err := keyfile.Private(path)
		if err != nil {
			return fmt.Errorf("trust_key: %w", err)
		}
		in.signers, in.keys = append(in.signers, s), append(in.keys, s.Public())
	}
	for _, k := range in.keys {
		id, err := envelope.Fingerprint(k)
		if err != nil {
			return err
		}
		in.ids = append(in.ids, id)
	}
	return nil
}

// ownKey reads the key in data_dir. Without create it may be nil.
func ownKey(path string, create bool) (crypto.Signer, error) {
	s, _, err := keyfile.Own(path)
	if !errors.Is(err, fs.ErrNotExist) {
		if err == nil && envelope.CheckKey(s.Public()) != nil {
			err = fmt.Errorf("%s: %w", path, envelope.ErrKey)
		}
		return s, err
	}
	if !create {
		return nil, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, files.WriteNew(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// paths are all files that are read.
func (c *Config) paths() (out []string) {
	out = append(out, c.AttestationCAs...)
	for _, p := range c.EKRoots {
		out = append(out, p)
		if list, err := os.ReadDir(p); err == nil {
			for _, e := range list {
				out = append(out, filepath.Join(p, e.Name()))
			}
		}
	}
	out = append(out, c.EKAllow, c.EKDeny)
	out = append(out, c.EKInventory...)
	out = append(out, c.PCRPolicies, c.Requirements, c.Revocations)
	for _, a := range c.TSAChains {
		path, _, _ := strings.Cut(a, ",")
		out = append(out, path)
	}
	for _, a := range c.LayoutKeys {
		_, path, ok := strings.Cut(a, "=")
		if !ok {
			path = a
		}
		out = append(out, path)
	}
	out = append(out, c.TrustKeys...)
	out = append(out, c.TrustKeysPublic...)
	return append(out, filepath.Join(c.DataDir, "trust.key"), filepath.Join(c.DataDir, trustName), c.TrustFile, c.SigstoreFile)
}

// stamp tells whether any file was changed since: names, sizes and times.
func (c *Config) stamp() string {
	var b strings.Builder
	for _, p := range c.paths() {
		if p == "" {
			continue
		}
		st, err := os.Stat(p)
		if err != nil {
			fmt.Fprintf(&b, "%s: %v\n", p, err)
			continue
		}
		fmt.Fprintf(&b, "%s: %d %s %v\n", p, st.Size(), st.ModTime().Format(time.RFC3339Nano), inode(st))
	}
	return b.String()
}
