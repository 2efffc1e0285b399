package verifycmd

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/oci"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// readTrust also returns trust.json's bytes, for what names it by digest. pins
// are the fingerprints of --trust-key.
func readTrust(path string, pins, revocations []string) (*link.Trust, []byte, error) {
	doc, err := cli.ReadInput(path, link.MaxTrustFile)
	if err != nil {
		return nil, nil, err
	}
	trust, err := link.OpenUnpinnedTrust(doc)
	if err == nil && len(pins) > 0 {
		err = trust.CheckSigner(pins)
	}
	if err != nil {
		return nil, nil, trustError(path, err, "export it again: rootlink-server trust export")
	}
	for _, name := range revocations {
		raw, err := cli.ReadInput(name, link.MaxTrustFile)
		if err != nil {
			return nil, nil, err
		}
		if trust, err = trust.WithRevocations(raw); err != nil {
			return nil, nil, trustError(name, err, "check that it belongs to this trust.json")
		}
	}
	return trust, doc, nil
}

// trustError says what to do about a file that nobody may believe.
func trustError(name string, err error, hint string) error {
	code := cli.ExitInternal
	switch {
	case errors.Is(err, link.ErrUnsigned):
		code, hint = cli.ExitCrypto, "have whoever holds the trust key sign it: rootlink trust sign --key KEY.pem "+name
	case errors.Is(err, link.ErrForeignTrust):
		code, hint = cli.ExitCrypto, "get it again from whoever runs the trust domain, and compare the key: `rootlink-server trust key` prints it"
	case errors.Is(err, link.ErrCrypto):
		code, hint = cli.ExitCrypto, "it was changed since it was signed: get it again"
	}
	return cli.Fail(code, fmt.Errorf("%s: %w", name, err), hint)
}

// readInputs tells bundles from artifacts and reads both. The suffix decides.
// Without a bundle that has it, one file may be the bundle by what it holds; no
// more, because what an artifact holds is for others to choose: one that is some
// genuine bundle would verify, and be compared with nothing.
func readInputs(in *link.Input, args []string) error {
	seen := map[string]bool{}
	suffixed := slices.ContainsFunc(args, hasSuffix)
	for _, name := range args {
		var raw []byte
		var err error
		if (hasSuffix(name) || !suffixed) && !oci.IsRef(name) {
			if raw, err = readBundle(name); err != nil {
				return err
			}
		}
		if raw != nil && !suffixed && len(in.Links) > 0 {
			return cli.Usage("name bundles with the suffix "+link.BundleSuffix+"; what has none is then an artifact",
				"both %s and %s hold a bundle, and only one can be known by that", in.Links[0].Name, name)
		}
		if raw == nil {
			a, err := digestArtifact(name)
			if err != nil {
				return err
			}
			in.Artifacts = append(in.Artifacts, a)
			continue
		}
		if seen[name] {
			return cli.Usage("name each once", "%s is given twice", name)
		}
		seen[name] = true
		l, err := readBeside(name, raw)
		if err != nil {
			return err
		}
		in.Links = append(in.Links, l)
	}
	if len(in.Links) == 0 {
		return cli.Usage("name the "+link.BundleSuffix+" file that `rootlink run` wrote", "no bundle among the %d files", len(args))
	}
	return nil
}

// readBeside reads what ships beside a bundle.
func readBeside(name string, raw []byte) (l link.LinkInput, err error) {
	l.Name, l.Bundle = name, raw
	if l.Parsed, err = link.ParseBundle(raw); err != nil {
		l.Parsed = nil
		return l, nil // Verify says what is wrong with it
	}
	if l.Detached, err = findDetached(name, l.Parsed); err != nil {
		return l, err
	}
	e := l.Parsed.UnverifiedEvidence(l.Detached)
	if e == nil {
		p, err := attest.ParentFromCertificate(l.Parsed.UnverifiedCertificate())
		if err != nil {
			return l, nil
		}
		e = &attest.Evidence{AKCert: p.AKCert, EventLog: p.EventLog} // whose files are looked for
	}
	if l.EventLog, err = findEventLog(name, e); err != nil {
		return l, err
	}
	l.LogProofs, err = findLogProof(name, e)
	return l, err
}

// readAllBeside does so for many, side by side: of large ones, decoding is most
// of the work.
func readAllBeside(links []link.LinkInput) error {
	errs := make([]error, len(links))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(len(links), runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(links); i = int(next.Add(1)) - 1 {
				links[i], errs[i] = readBeside(links[i].Name, links[i].Bundle)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func hasSuffix(name string) bool { return strings.HasSuffix(name, link.BundleSuffix) }

// readBundle returns nil when name is no bundle. A file with the suffix of one
// is one whatever it holds, so that a broken bundle is not taken for an artifact.
func readBundle(name string) ([]byte, error) {
	st, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	suffix := hasSuffix(name)
	if !st.Mode().IsRegular() || st.Size() > link.MaxBundle {
		if suffix && st.Mode().IsRegular() {
			return nil, cli.Fail(cli.ExitCrypto, fmt.Errorf("%s is larger than any bundle (%d bytes)", name, link.MaxBundle), "")
		}
		return nil, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if !suffix {
		// Only JSON is worth reading whole.
		head := make([]byte, 64)
		n, err := io.ReadFull(f, head)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if !bytes.HasPrefix(bytes.TrimLeft(head[:n], " \t\r\n"), []byte("{")) {
			return nil, nil
		}
	}
	raw, err := cli.ReadInput(name, link.MaxBundle)
	if err != nil {
		return nil, err
	}
	if suffix || link.IsBundle(raw) {
		return raw, nil
	}
	return nil, nil
}

// findDetached looks beside the bundle for the record that its node made, where
// the certificate carries no evidence. Verify says what it means to have none.
func findDetached(bundle string, b *link.Bundle) ([]byte, error) {
	name := b.DetachedName()
	if name == "" {
		return nil, nil
	}
	record, err := cli.ReadInput(filepath.Join(filepath.Dir(bundle), name), attest.MaxDetached)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, files.ErrTooLarge):
		// It comes from whoever wants to be believed, as the bundle does: no trouble
		// of the disk, but a record that Verify refuses for its size.
		return make([]byte, attest.MaxDetached+1), nil
	}
	return record, err
}

// findEventLog looks beside the bundle for the boot event log that its
// evidence names by digest. Having none is fine: it adds a claim, and its
// absence takes nothing from the rest.
func findEventLog(bundle string, e *attest.Evidence) ([]byte, error) {
	if e.EventLog == nil {
		return nil, nil
	}
	name := link.EventLogName(e.EventLog)
	if filepath.Base(name) != name { // the record is a stranger's: it chooses no directory
		return nil, nil
	}
	path := filepath.Join(filepath.Dir(bundle), name)
	log, err := cli.ReadInput(path, attest.MaxEventLog)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if d := attest.EventLogDigest(log); err == nil && d.Alg == e.EventLog.Alg && !bytes.Equal(d.Value, e.EventLog.Value) {
		return nil, nil // not that log: as good as none
	}
	return log, err
}

// findLogProof looks beside the bundle for the log entry of the AK certificate
// in it. Having none is fine, unless a requirement wants it.
func findLogProof(bundle string, e *attest.Evidence) ([][]byte, error) {
	proof, err := cli.ReadInput(filepath.Join(filepath.Dir(bundle), link.LogProofName(e.AKCert)), tlog.MaxEntryJSON)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return [][]byte{proof}, nil
}

// digestArtifact takes the digest of a file, the dirHash of a directory, or the
// digest of an image.
func digestArtifact(name string) (link.Artifact, error) {
	if oci.IsRef(name) {
		return digestImage(name)
	}
	a := link.Artifact{Name: name, Digest: map[string]string{}}
	st, err := os.Stat(name)
	if err != nil {
		return a, err
	}
	if !st.IsDir() {
		if !st.Mode().IsRegular() {
			return a, cli.Usage("name a file or a directory", "%s is neither a file nor a directory", name)
		}
		h, err := files.SHA256(name)
		a.Digest["sha256"] = hex.EncodeToString(h[:])
		return a, err
	}
	err = digestTree(&a, name)
	return a, err
}

// digestTree fills in a's files, and its dirHash when it has one.
func digestTree(a *link.Artifact, name string) error {
	sums, whole := map[string][32]byte{}, true
	a.Files = map[string]string{}
	err := filepath.WalkDir(name, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Name() == ".git" && path != name {
			return cli.Hint(fmt.Errorf("%s is not recorded, so it cannot be verified", path), "verify a copy without it, or name the files one by one")
		}
		if d.IsDir() {
			return nil
		}
		if !d.Type().IsRegular() {
			// A link to a file is recorded with that file's content, and is not
			// part of a dirHash.
			st, err := os.Stat(path)
			if err != nil || d.Type() != fs.ModeSymlink || !st.Mode().IsRegular() {
				return cli.Hint(fmt.Errorf("%s is neither a file nor a link to one, so it cannot be verified", path), "remove it, or name the files one by one")
			}
			whole = false
		}
		rel, err := filepath.Rel(name, path)
		if err != nil {
			return err
		}
		h, err := files.SHA256(path)
		sums[filepath.ToSlash(rel)] = h
		a.Files[filepath.ToSlash(rel)] = hex.EncodeToString(h[:])
		return err
	})
	if err != nil || !whole {
		return err
	}
	a.Digest[link.DirHashAlg], err = link.DirHash(sums)
	return err
}
