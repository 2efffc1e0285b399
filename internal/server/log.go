package server

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"sync"
	"time"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/internal/tlog"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// Times of logging a certificate.
const (
	logTimeout      = 10 * time.Second // for it to be part of the tree
	publishTimeout  = time.Minute      // for its proof
	publishedEvery  = time.Second      // how often published ones are written down
	maxRecordsAtA   = 1024             // certificates in one commit
	pendingAtATime  = 256              // at a start
	recordQueueSize = 256
)

// ErrNoLog means that the server keeps no transparency log.
var ErrNoLog = errors.New("this server keeps no transparency log")

// certLog records the certificates that the server issues and logs them. The
// record comes first: what a crash cuts off is logged at the next start.
type certLog struct {
	s     *Server
	log   *tlog.Log
	queue chan recording
	stop  context.CancelFunc
	ctx   context.Context
	wg    sync.WaitGroup

	mu        sync.Mutex
	published [][32]byte
}

type recording struct {
	cert store.IssuedCertificate
	done chan error
}

// openLog opens the transparency log, unless the configuration wants none, and
// logs what an earlier run recorded and did not get to log.
func (s *Server) openLog(ctx context.Context) error {
	if s.cfg.NoTransparencyLog {
		return nil
	}
	origin := s.cfg.LogOrigin
	if _, err := tlog.ReadIdentity(s.cfg.DataDir); origin == "" && errors.Is(err, fs.ErrNotExist) {
		origin = "log." + s.cfg.TrustDomain
	}
	log, err := tlog.Open(ctx, tlog.Config{
		DataDir: s.cfg.DataDir, Origin: origin, WitnessPolicy: s.cfg.WitnessPolicy,
		Operator: s.cfg.TrustDomain, Log: s.cfg.Log,
	})
	if err != nil {
		return err
	}
	c := &certLog{s: s, log: log, queue: make(chan recording, recordQueueSize)}
	c.ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.certLog = c
	s.logHandler = log.Handler(tlog.HandlerConfig{Accept: s.acceptLogEntry, Now: s.cfg.Now})
	c.wg.Go(c.run)
	pending, err := s.store.PendingCertificates(ctx)
	if err != nil {
		return err
	}
	for len(pending) > 0 {
		n := min(pendingAtATime, len(pending))
		if err := c.integrate(ctx, pending[:n]); err != nil {
			return err
		}
		pending = pending[n:]
	}
	return nil
}

// acceptLogEntry: SVIDs of this trust domain that are valid now, no others.
func (s *Server) acceptLogEntry(cert *x509.Certificate) (string, error) {
	id, err := s.verifyClient([]*x509.Certificate{cert})
	return id.String(), err
}

// logAuthority logs an SVID authority, signed by itself. A nil key is that of
// an authority whose key has been deleted.
func (c *certLog) logAuthority(ctx context.Context, cert *x509.Certificate, key *ecdsa.PrivateKey) error {
	digest := sha256.Sum256(cert.Raw)
	record := store.IssuedCertificate{
		Digest: digest, Kind: store.CertAuthority, Subject: fmt.Sprintf("%x", cert.SubjectKeyId), IssuedAt: cert.NotBefore,
	}
	return c.once(ctx, record, func() ([]byte, error) {
		if key == nil {
			c.s.cfg.Log.Warn("X.509 authority is not in the transparency log and cannot be: its key is gone", "authority", record.Subject)
			return nil, nil
		}
		sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			return nil, err
		}
		return pub.CertificateBody(cert, sig, cert)
	})
}

// logAttestationCA logs the attestation CA, signed by itself: whoever certified
// it, if somebody did, is not here.
func (s *Server) logAttestationCA(ctx context.Context) error {
	if s.certLog == nil {
		return nil
	}
	cert := s.attestationCA.Certificate()
	return s.certLog.once(ctx, store.IssuedCertificate{
		Digest: sha256.Sum256(cert.Raw), Kind: store.CertAttestationCA, Subject: fmt.Sprintf("%x", cert.SubjectKeyId), IssuedAt: cert.NotBefore,
	}, func() ([]byte, error) { return s.attestationCA.LogEntry(cert) })
}

// logAKCertificate logs an AK certificate before its agent gets it. It waits
// until the entry is part of the tree on disk, and not for witnesses: that they
// are away must not keep nodes out.
func (s *Server) logAKCertificate(ctx context.Context, agentID string, cert *x509.Certificate) error {
	if s.certLog == nil {
		return nil
	}
	body, err := s.attestationCA.LogEntry(cert)
	if err != nil {
		return err
	}
	return s.certLog.record(ctx, store.IssuedCertificate{
		Digest: sha256.Sum256(cert.Raw), Kind: store.CertAK, Subject: agentID, IssuedAt: s.cfg.Now(), Body: body,
	})
}

// once logs a certificate that may be logged already. body may return none.
func (c *certLog) once(ctx context.Context, record store.IssuedCertificate, body func() ([]byte, error)) error {
	_, err := c.log.CertificateIndex(ctx, record.Digest)
	switch {
	case err == nil:
		return c.s.store.AddCertificates(ctx, []store.IssuedCertificate{record})
	case !errors.Is(err, tlog.ErrNotLogged):
		return err
	}
	if record.Body, err = body(); err != nil || record.Body == nil {
		return err
	}
	return c.record(ctx, record)
}

// record makes the record durable, and then the certificate part of the log.
func (c *certLog) record(ctx context.Context, cert store.IssuedCertificate) error {
	ctx, cancel := context.WithTimeout(ctx, logTimeout)
	defer cancel()
	r := recording{cert, make(chan error, 1)}
	select {
	case c.queue <- r:
	case <-ctx.Done():
		return ctx.Err()
	case <-c.ctx.Done():
		return tlog.ErrClosed
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-c.ctx.Done():
		return tlog.ErrClosed
	}
}

// run commits records in groups: 500 nodes that attest at a time wait for a few
// commits and not for 500.
func (c *certLog) run() {
	tick := time.NewTicker(publishedEvery)
	defer tick.Stop()
	for {
		var group []recording
		select {
		case <-c.ctx.Done():
			return
		case <-tick.C:
			c.writePublished()
			continue
		case r := <-c.queue:
			group = append(group, r)
		}
	more:
		for len(group) < maxRecordsAtA {
			select {
			case r := <-c.queue:
				group = append(group, r)
			default:
				break more
			}
		}
		certs := make([]store.IssuedCertificate, len(group))
		for i, r := range group {
			certs[i] = r.cert
		}
		if err := c.s.store.AddCertificates(c.ctx, certs); err != nil {
			for _, r := range group {
				r.done <- err
			}
			continue
		}
		for _, r := range group {
			c.wg.Go(func() { r.done <- c.integrate(c.ctx, []store.IssuedCertificate{r.cert}) })
		}
	}
}

// integrate logs recorded certificates and sees to it that their publication
// is written down.
func (c *certLog) integrate(ctx context.Context, certs []store.IssuedCertificate) error {
	errs := make([]error, len(certs))
	var wg sync.WaitGroup
	for i, cert := range certs {
		wg.Go(func() {
			_, errs[i] = c.log.Integrate(ctx, cert.Body)
			if errs[i] != nil {
				return
			}
			c.wg.Go(func() {
				ctx, cancel := context.WithTimeout(c.ctx, publishTimeout)
				defer cancel()
				// Away witnesses: the record stays pending, and the next start
				// looks again.
				if _, err := c.log.CertificateProof(ctx, cert.Digest); err == nil {
					c.mu.Lock()
					c.published = append(c.published, cert.Digest)
					c.mu.Unlock()
				}
			})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (c *certLog) writePublished() {
	c.mu.Lock()
	done := c.published
	c.published = nil
	c.mu.Unlock()
	if len(done) == 0 {
		return
	}
	if err := c.s.store.CertificatesPublished(context.WithoutCancel(c.ctx), done); err != nil {
		c.s.cfg.Log.Error("record publication of certificates", "error", err)
	}
}

func (c *certLog) close() error {
	c.stop()
	err := c.log.Close()
	c.wg.Wait()
	c.writePublished()
	return err
}

// Logs are the transparency logs of this server, as verifiers know them: one,
// or none.
func (s *Server) Logs() []pub.Log {
	if s.certLog == nil {
		return nil
	}
	return []pub.Log{s.certLog.log.Info()}
}

// LogWitnesses are the witnesses whose cosignatures the log gets.
func (s *Server) LogWitnesses() []pub.Witness {
	if s.certLog == nil {
		return nil
	}
	return s.certLog.log.Witnesses()
}

// CertificateProof returns the proof that the certificate whose DER has this
// SHA-256 is in the log.
func (s *Server) CertificateProof(ctx context.Context, sha256 [32]byte) (*rekorv1.TransparencyLogEntry, error) {
	if s.certLog == nil {
		return nil, ErrNoLog
	}
	return s.certLog.log.CertificateProof(ctx, sha256)
}

// LogHandler serves the log below its URL; nil without one.
func (s *Server) LogHandler() http.Handler { return s.logHandler }
