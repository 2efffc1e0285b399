package tlog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// Issued is the server's own record of a certificate that the log must hold.
type Issued struct {
	Digest   [32]byte
	Kind     string
	Subject  string
	IssuedAt time.Time
	Pending  bool // it was not seen in a published checkpoint yet
}

// AlarmKind says what is wrong with a log whose tree is sound.
type AlarmKind string

// What an audit alarms of.
const (
	// UnknownCertificate: the log holds a certificate that the server has no
	// record of: somebody else has its CA's key, or its records.
	UnknownCertificate AlarmKind = "unknown_certificate"
	// MissingCertificate: the server issued it, and the log does not show it.
	MissingCertificate AlarmKind = "missing_certificate"
	// UnloggedAuthority: an SVID in the log is by an authority that is not.
	UnloggedAuthority AlarmKind = "unlogged_authority"
	// BadEntry: an entry in an unknown form, or whose signature does not hold.
	BadEntry AlarmKind = "bad_entry"
)

// Alarm is one thing that somebody must look at.
type Alarm struct {
	Kind   AlarmKind `json:"kind"`
	Index  *uint64   `json:"index,omitempty"`
	SHA256 string    `json:"sha256,omitempty"` // of the certificate
	Detail string    `json:"detail"`
}

// maxAlarms bounds what an audit collects of one log.
const maxAlarms = 1000

// pendingGrace is how long a record may wait for its checkpoint. After it the
// certificate counts as missing; witnesses that are away hold checkpoints up.
const pendingGrace = 10 * time.Minute

// Audit is what a look at a whole log found.
type Audit struct {
	Checkpoint   pub.Checkpoint
	Cosigned     []pub.Cosignature
	Signatures   int // entries about signatures
	Certificates int // entries about certificates
	Compared     int // records that the log was compared with
	Pending      int // records that are not in a checkpoint yet, and need not be
	Alarms       []Alarm
	More         int // alarms beyond what is listed
}

func (a *Audit) alarm(x Alarm) {
	if len(a.Alarms) == maxAlarms {
		a.More++
		return
	}
	a.Alarms = append(a.Alarms, x)
}

// RunAudit verifies a whole log and, unless issued is nil, holds it against the
// server's records. It reads them before and after the log, because a running
// server adds to both: what is missing was recorded before, what is unknown is
// recorded even after.
func RunAudit(ctx context.Context, src Source, l pub.Log, ws []pub.Witness, issued func(context.Context) ([]Issued, error), now time.Time) (*Audit, error) {
	a := new(Audit)
	var before []Issued
	var err error
	if issued != nil {
		if before, err = issued(ctx); err != nil {
			return nil, err
		}
		a.Compared = len(before)
	}
	certs := map[[32]byte]uint64{}
	authorities := map[string][]*x509.Certificate{} // by subject key identifier, logged so far
	cp, cosigned, err := CheckTree(ctx, src, l, ws, func(idx uint64, body []byte) error {
		e, err := pub.ParseBody(body)
		if err == nil {
			err = e.CheckSignature()
		}
		if err != nil {
			a.alarm(Alarm{Kind: BadEntry, Index: &idx, Detail: err.Error()})
			return nil
		}
		if e.Certificate.IsCA {
			a.Certificates++
			if _, known := certs[e.Digest]; !known {
				certs[e.Digest] = idx
			}
			if ski := string(e.Certificate.SubjectKeyId); e.Digest == sha256.Sum256(e.Certificate.Raw) {
				authorities[ski] = append(authorities[ski], e.Certificate)
			}
			return nil
		}
		a.Signatures++
		if !slices.ContainsFunc(authorities[string(e.Certificate.AuthorityKeyId)], func(ca *x509.Certificate) bool {
			return bytes.Equal(ca.RawSubject, e.Certificate.RawIssuer) && e.Certificate.CheckSignatureFrom(ca) == nil
		}) {
			a.alarm(Alarm{Kind: UnloggedAuthority, Index: &idx, Detail: fmt.Sprintf("no authority that is in the log before issued the SVID with the serial number %s", e.Certificate.SerialNumber)})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	a.Checkpoint, a.Cosigned = *cp, cosigned
	if issued == nil {
		return a, nil
	}
	for _, c := range before {
		if _, ok := certs[c.Digest]; ok {
			continue
		}
		if c.Pending && now.Sub(c.IssuedAt) < pendingGrace {
			a.Pending++
			continue
		}
		a.alarm(Alarm{
			Kind: MissingCertificate, SHA256: hex.EncodeToString(c.Digest[:]),
			Detail: fmt.Sprintf("%s of %s, issued %s", c.Kind, c.Subject, c.IssuedAt.UTC().Format(time.RFC3339)),
		})
	}
	after, err := issued(ctx)
	if err != nil {
		return nil, err
	}
	known := make(map[[32]byte]bool, len(after))
	for _, c := range after {
		known[c.Digest] = true
	}
	var unknown []uint64
	digests := map[uint64][32]byte{}
	for d, idx := range certs {
		if !known[d] {
			unknown, digests[idx] = append(unknown, idx), d
		}
	}
	slices.Sort(unknown)
	for _, idx := range unknown {
		d := digests[idx]
		a.alarm(Alarm{
			Kind: UnknownCertificate, Index: &idx, SHA256: hex.EncodeToString(d[:]),
			Detail: "this server has no record of issuing it",
		})
	}
	return a, nil
}
