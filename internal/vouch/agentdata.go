package vouch

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

const (
	// agentDataFile is where a SPIRE agent keeps its SVID and the bundle.
	agentDataFile = "agent-data.json"
	maxAgentData  = 1 << 20 // bytes of it
	maxBundle     = 256     // authorities in it
)

// ErrNoAgentSVID means that the SPIRE agent has no SVID in force: it has not
// attested, or is about to attest again.
var ErrNoAgentSVID = errors.New("the SPIRE agent has no SVID of this node yet")

// agentData is what a SPIRE agent saved about itself, read anew for every use:
// it changes with each attestation and each rotation of the authorities.
type agentData struct {
	svid   []*x509.Certificate
	bundle *x509bundle.Bundle
}

// readAgentData reads dir's agent-data.json. Others than the agent's user must
// not be able to put another one there: it says under whose key this node's
// evidence is, and which authorities made the SVIDs that it is about.
func readAgentData(dir string, td spiffeid.TrustDomain) (*agentData, error) {
	path := filepath.Join(dir, agentDataFile)
	d, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_PATH, 0)
	if err == nil {
		defer d.Close()
		err = onlyOurs(d, dir, fs.ModeDir)
	}
	if err != nil {
		return nil, dataError(err)
	}
	// Within the directory that was looked at, and never through a link. A fifo
	// would hold us up.
	fd, err := unix.Openat(int(d.Fd()), agentDataFile, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, ErrNoAgentSVID
	}
	if err != nil {
		return nil, dataError(&fs.PathError{Op: "open", Path: path, Err: err})
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := onlyOurs(f, path, 0); err != nil {
		return nil, dataError(err)
	}
	b, err := files.ReadAll(f, path, maxAgentData)
	if err != nil {
		return nil, dataError(err)
	}
	return parseAgentData(b, td)
}

// onlyOurs fails unless nobody but our own user and root can change f.
func onlyOurs(f *os.File, name string, kind fs.FileMode) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Mode().Type() != kind {
		return fmt.Errorf("%s is no regular file", name)
	}
	owner := st.Sys().(*syscall.Stat_t).Uid
	if owner != 0 && int(owner) != os.Geteuid() {
		return cli.Hint(fmt.Errorf("%s belongs to uid %d, who could put another agent's data there", name, owner),
			"agent_data_dir must be the data_dir of the SPIRE agent that runs this plugin")
	}
	if st.Mode().Perm()&0o022 != 0 {
		return cli.Hint(fmt.Errorf("%s is writable for others, who could put another agent's data there", name), "chmod go-w "+name)
	}
	return nil
}

// dataError is about a file or directory that an operator must look at.
func dataError(err error) error {
	hint := cli.HintOf(err)
	if hint == "" {
		hint = "agent_data_dir must be the data_dir of the SPIRE agent that runs this plugin"
	}
	return cli.Hint(fmt.Errorf("data of the SPIRE agent: %w", err), hint)
}

func parseAgentData(b []byte, td spiffeid.TrustDomain) (*agentData, error) {
	var j struct {
		SVID   [][]byte `json:"svid"`
		Bundle [][]byte `json:"bundle"`
	}
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, dataError(fmt.Errorf("%s: %w", agentDataFile, err))
	}
	if len(j.SVID) == 0 || len(j.Bundle) == 0 {
		return nil, ErrNoAgentSVID
	}
	if len(j.SVID) > attest.MaxAgentChain || len(j.Bundle) > maxBundle {
		return nil, dataError(fmt.Errorf("%s holds an SVID of %d certificates and %d authorities, at most %d and %d are taken",
			agentDataFile, len(j.SVID), len(j.Bundle), attest.MaxAgentChain, maxBundle))
	}
	svid, err := parsePEM(j.SVID)
	if err != nil {
		return nil, dataError(fmt.Errorf("%s: svid: %w", agentDataFile, err))
	}
	authorities, err := parsePEM(j.Bundle)
	if err != nil {
		return nil, dataError(fmt.Errorf("%s: bundle: %w", agentDataFile, err))
	}
	return &agentData{svid, x509bundle.FromX509Authorities(td, authorities)}, nil
}

// parsePEM parses certificates as SPIRE saves them, each a PEM block of its own.
func parsePEM(pems [][]byte) (out []*x509.Certificate, err error) {
	for _, b := range pems {
		block, rest := pem.Decode(b)
		if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) != 0 {
			return nil, errors.New("not one certificate in PEM")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// parseDER parses certificates as callers send them.
func parseDER(ders [][]byte) (out []*x509.Certificate, err error) {
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// ErrOtherNode means that the SPIRE agent's data is that of another node, or of
// an agent that attested by other means.
var ErrOtherNode = errors.New("the SPIRE agent's SVID is not that of this TPM")

// check fails unless the agent SVID is in force and that of this node. An
// expired one is ErrNoAgentSVID: the next is on its way.
func (a *agentData) check(node spiffeid.ID, now time.Time) error {
	if now.Before(a.svid[0].NotBefore) || now.After(a.svid[0].NotAfter) {
		return fmt.Errorf("%w: the last one is valid from %s to %s", ErrNoAgentSVID,
			a.svid[0].NotBefore.UTC().Format(time.RFC3339), a.svid[0].NotAfter.UTC().Format(time.RFC3339))
	}
	id, _, err := x509svid.Verify(a.svid, a.bundle, x509svid.WithTime(now))
	if err != nil {
		return dataError(fmt.Errorf("agent SVID: %w", err))
	}
	if id != node {
		return cli.Hint(fmt.Errorf("%w: it is of %s, this TPM is %s", ErrOtherNode, id, node),
			"agent_data_dir must be the data_dir of the SPIRE agent that runs this plugin, attested by it")
	}
	return nil
}
