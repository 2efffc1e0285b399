package recorder

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/stamp"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// write writes the logs and then the bundle, which so never names a log that
// is not there yet.
func (r *state) write(s *Signed, proof *stamp.Outcome) error {
	b, err := s.Bundle.Marshal()
	if err != nil {
		return err
	}
	out := r.bundlePath(s)
	if err := writeLogs(filepath.Dir(out), s); err != nil {
		return err
	}
	dir := filepath.Dir(out)
	if proof != nil && proof.Proof != nil {
		if err := files.Write(filepath.Join(dir, proof.ProofAs), proof.Proof, 0o644); err != nil {
			return err
		}
	}
	drop, err := writeDetached(dir, s)
	if err != nil {
		return err
	}
	if err := files.Write(out, b, 0o644); err != nil {
		drop()
		return err
	}
	if r.failed() {
		r.say("the step FAILED with %s; recorded in %s and signed by %s%s", r.outcome(), out, s.SPIFFEID, s.where())
	} else {
		r.say("%s signed by %s%s", out, s.SPIFFEID, s.where())
	}
	if m := r.measured.GetMeasurement(); s.Evidence != nil && !m.GetRecorderProtected() {
		r.say("the recorder is unprotected, so other programs of this user could sign in its place (%s): docs/recording.md, \"The recorder\"", m.GetUnprotectedReason())
	}
	return nil
}

// where says where the evidence is, if not in the SVID.
func (s *Signed) where() string {
	switch {
	case s.Evidence == nil:
		return ", WITHOUT EVIDENCE"
	case s.Detached != nil:
		return ", evidence in " + s.DetachedAs
	}
	return ""
}

// writeDetached writes evidence that lies beside, before what it is about. drop
// takes it away again.
func writeDetached(dir string, s *Signed) (drop func(), err error) {
	if s.Detached == nil {
		return func() {}, nil
	}
	b, err := s.Detached.Marshal()
	if err != nil {
		return nil, err
	}
	name := filepath.Join(dir, s.DetachedAs)
	return func() { os.Remove(name) }, files.Write(name, b, 0o644)
}

// writeLogs writes the logs that the evidence names.
func writeLogs(dir string, s *Signed) error {
	if s.Evidence == nil {
		return nil
	}
	for _, log := range []struct {
		digest *attest.TypedDigest
		data   []byte
		suffix string
	}{{s.Evidence.EventLog, s.EventLog, ""}, {s.Evidence.IMALog, s.IMALog, ".imalog"}} {
		if log.digest == nil || len(log.data) == 0 {
			continue
		}
		name := link.EventLogName(log.digest)
		if log.suffix != "" {
			name = fmt.Sprintf("%s-%x%s", log.digest.Alg, log.digest.Value, log.suffix)
		}
		if err := writeLog(filepath.Join(dir, name), log.digest, log.data); err != nil {
			return err
		}
	}
	return nil
}

// writeClassic writes a classic link. It can carry no time.
func (r *state) writeClassic(s *Signed) error {
	if err := writeLogs(filepath.Dir(r.LinkOut), s); err != nil {
		return err
	}
	drop, err := writeDetached(filepath.Dir(r.LinkOut), s)
	if err != nil {
		return err
	}
	if err := files.Write(r.LinkOut, s.Classic, 0o644); err != nil {
		drop()
		return err
	}
	r.say("%s signed by %s%s, a classic link without time: what checks certificates takes it for minutes only", r.LinkOut, s.SPIFFEID, s.where())
	return nil
}

func (r *state) bundlePath(s *Signed) string {
	if r.BundleOut != "" {
		return r.BundleOut
	}
	return filepath.Join(r.BundleDir, fmt.Sprintf("%s.%x%s", r.Name, s.KeyHash[:4], link.BundleSuffix))
}

// failed: the command failed and is recorded all the same.
func (r *state) failed() bool {
	c := r.stmt.Byproducts.ExitCode
	return c != nil && *c != 0
}

func (r *state) outcome() string {
	return describe(Status{Code: *r.stmt.Byproducts.ExitCode, Signal: r.stmt.Byproducts.Signal})
}

// writeLog writes a log under the name of its digest; one that is there
// already is the same.
func writeLog(path string, d *attest.TypedDigest, data []byte) error {
	sum := sha256.Sum256(data)
	if d.Alg != "sha256" || !bytes.Equal(sum[:], d.Value) {
		return errors.New("the agent sent another log than the evidence names")
	}
	if st, err := os.Lstat(path); err == nil && st.Mode().IsRegular() && st.Size() == int64(len(data)) {
		return nil
	}
	return files.Write(path, data, 0o644)
}

// writeUnsigned writes the bare statement, never under a bundle's name.
func (r *state) writeUnsigned(p *link.Prepared) error {
	out := filepath.Join(r.BundleDir, r.Name+".unsigned.json")
	if r.BundleOut != "" {
		out = r.BundleOut + ".unsigned"
	}
	if err := files.Write(out, append(p.Payload(), '\n'), 0o644); err != nil {
		return err
	}
	if r.failed() {
		r.say("the step FAILED with %s; recorded in %s, which is NOT signed", r.outcome(), out)
		return nil
	}
	r.say("%s is NOT signed", out)
	return nil
}
