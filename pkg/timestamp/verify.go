package timestamp

import (
	"bytes"
	"crypto/sha1" // ESSCertID of version 1 only, see isSigner
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Authority is a timestamp authority that the caller trusts, and the window in
// which it does.
type Authority struct {
	// Chain is what Sigstore's trusted root holds: the certificate that signs
	// tokens first or, where that may change, the CA that issues it; then its
	// issuers; the self-signed root last.
	Chain []*x509.Certificate
	// Start and End are inclusive. A zero End leaves the window open.
	Start, End time.Time
	URI        string // where tokens are made, for people
	Operator   string // who runs it, for people and for N-of-M by operator
}

// Verified is what a token proves once it has been held against its signature
// and a trusted authority.
type Verified struct {
	Time      time.Time
	Accuracy  time.Duration // the true time is within this of Time; 0 when the authority did not say
	Authority *Authority    // which of the given ones
	// AuthorityID is the SHA-256 of the root's public key. It is what counts as
	// one authority: two tokens of one, by whatever certificates, are one vote.
	AuthorityID [32]byte
	Serial      *big.Int
}

// Validate says whether an authority can be trusted at all. Call it where
// authorities are read; Verify repeats the cheap part.
func (a *Authority) Validate() error {
	if err := a.usable(); err != nil {
		return err
	}
	// A chain without its root would make one authority look like two.
	root := a.root()
	if err := root.CheckSignature(root.SignatureAlgorithm, root.RawTBSCertificate, root.Signature); err != nil {
		return fmt.Errorf("%w: the last certificate of its chain is no root: %w", ErrAuthority, err)
	}
	for i, c := range a.Chain[:len(a.Chain)-1] {
		if err := c.CheckSignatureFrom(a.Chain[i+1]); err != nil {
			return fmt.Errorf("%w: certificate %d of its chain: %w", ErrAuthority, i, err)
		}
	}
	if leaf := a.leaf(); leaf != nil {
		if err := mayTimestamp(leaf); err != nil {
			return fmt.Errorf("%w: %w", ErrAuthority, err)
		}
	}
	return nil
}

func (a *Authority) root() *x509.Certificate { return a.Chain[len(a.Chain)-1] }

// leaf is the certificate that must have signed, nil when any that Chain[0]
// issued may have.
func (a *Authority) leaf() *x509.Certificate {
	if a.Chain[0].IsCA {
		return nil
	}
	return a.Chain[0]
}

func (a *Authority) usable() error {
	switch {
	case len(a.Chain) == 0 || len(a.Chain) > MaxChain:
		return fmt.Errorf("%w: %d certificates in its chain, 1 to %d allowed", ErrAuthority, len(a.Chain), MaxChain)
	case a.Start.IsZero():
		return fmt.Errorf("%w: it has no window", ErrAuthority)
	case !a.End.IsZero() && a.End.Before(a.Start):
		return fmt.Errorf("%w: its window ends before it starts", ErrAuthority)
	}
	for i, c := range a.Chain {
		if c == nil {
			return fmt.Errorf("%w: certificate %d of its chain is missing", ErrAuthority, i)
		}
		// Only the first may be an end entity.
		if i > 0 && (!c.BasicConstraintsValid || !c.IsCA) {
			return fmt.Errorf("%w: certificate %d of its chain is no CA", ErrAuthority, i)
		}
	}
	if root := a.root(); !root.IsCA || !bytes.Equal(root.RawIssuer, root.RawSubject) {
		return fmt.Errorf("%w: the last certificate of its chain is no root", ErrAuthority)
	}
	return nil
}

// Verify holds the token against the signature that it should be for and the
// authorities that may have made it. The order is that of what may be said about
// it: a token for something else is bad, whoever made it.
func (t *Token) Verify(signature []byte, authorities []Authority) (Verified, error) {
	for i := range authorities {
		if err := authorities[i].usable(); err != nil {
			return Verified{}, err
		}
	}
	if err := t.covers(signature); err != nil {
		return Verified{}, err
	}
	failed := fmt.Errorf("%w: nobody given made it", ErrUnknownAuthority)
	for i := range authorities {
		a := &authorities[i]
		signer := t.signerOf(a)
		if signer == nil {
			continue
		}
		err := t.judge(a, signer)
		if err == nil {
			return Verified{
				Time: t.time, Accuracy: t.accuracy, Authority: a, Serial: new(big.Int).Set(t.serial),
				AuthorityID: sha256.Sum256(a.root().RawSubjectPublicKeyInfo),
			}, nil
		}
		// One authority may be listed twice, for two windows: the most telling
		// failure is kept.
		if errors.Is(failed, ErrUnknownAuthority) || errors.Is(failed, ErrOutsideWindow) {
			failed = err
		}
	}
	return Verified{}, failed
}

// covers: the token is for exactly these bytes.
func (t *Token) covers(signature []byte) error {
	h := t.hash.New()
	h.Write(signature)
	if subtle.ConstantTimeCompare(h.Sum(nil), t.imprint) != 1 {
		return bad(ErrWrongImprint, "%v of it is %x", t.hash, t.imprint)
	}
	return nil
}

// signerOf finds the certificate that says it signed the token, if it is a's:
// the one that a pins, or an embedded one that a's first CA issued. Embedded
// certificates are never links of the chain.
func (t *Token) signerOf(a *Authority) *x509.Certificate {
	if leaf := a.leaf(); leaf != nil {
		if t.names(leaf) {
			return leaf
		}
		return nil
	}
	for _, c := range t.certificates {
		if t.names(c) && bytes.Equal(c.RawIssuer, a.Chain[0].RawSubject) && c.CheckSignatureFrom(a.Chain[0]) == nil {
			return c
		}
	}
	return nil
}

func (t *Token) names(c *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, t.issuer) && c.SerialNumber.Cmp(t.certSerial) == 0
}

func (t *Token) judge(a *Authority, signer *x509.Certificate) error {
	if err := t.signedBy(signer); err != nil {
		return err
	}
	// RFC 3161, 4.3: the certificate must have been good when it signed. Its
	// end since then takes nothing away.
	roots, others := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(a.root())
	for _, c := range a.Chain[:len(a.Chain)-1] {
		others.AddCert(c)
	}
	if _, err := signer.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: others, CurrentTime: t.time,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageTimeStamping},
	}); err != nil {
		return bad(ErrSigner, "%v", err)
	}
	if t.time.Before(a.Start) || !a.End.IsZero() && t.time.After(a.End) {
		return bad(ErrOutsideWindow, "%v", t.time)
	}
	if t.accuracy > MaxAccuracy {
		return bad(ErrImprecise, "accuracy of %v", t.accuracy)
	}
	return nil
}

// signedBy: the certificate may sign timestamps, and its key signed this one.
func (t *Token) signedBy(signer *x509.Certificate) error {
	if err := mayTimestamp(signer); err != nil {
		return err
	}
	if !strongKey(signer.PublicKey) {
		return bad(ErrWeak, "key of the authority's certificate")
	}
	// RFC 5035, 5.4: the attribute keeps another certificate for the same key,
	// with other rights or another name, from being put in the signer's place.
	for _, id := range t.signers {
		if !id.matches(signer) {
			return bad(ErrSigner, "the token names another certificate")
		}
	}
	// RFC 3161, 2.4.2: the name in the token is one of the certificate's.
	if t.directory != nil && !bytes.Equal(t.directory, signer.RawSubject) {
		return bad(ErrSigner, "the token names another authority")
	}
	if !t.signingTime.IsZero() && (t.signingTime.Before(signer.NotBefore) || t.signingTime.After(signer.NotAfter)) {
		return bad(ErrSigner, "signing time %v is outside its certificate's validity", t.signingTime)
	}
	if err := signer.CheckSignature(t.algorithm, t.attributes, t.signature); err != nil {
		return bad(ErrSignature, "%v", err)
	}
	return nil
}

// matches compares digests of the certificate. Version 1 has SHA-1, for which
// nobody can make a second certificate to a given one, and the issuer's
// signature on the certificate does not rest on it.
func (id certID) matches(c *x509.Certificate) bool {
	if id.sha1 {
		sum := sha1.Sum(c.Raw)
		return bytes.Equal(sum[:], id.digest)
	}
	h := id.hash.New()
	h.Write(c.Raw)
	return bytes.Equal(h.Sum(nil), id.digest)
}

// mayTimestamp is RFC 3161, 2.3: the certificate's key is for timestamps and
// for nothing else, and says so critically. A certificate that may also do
// something else shares its key with a service that anybody may make sign.
func mayTimestamp(c *x509.Certificate) error {
	if c.IsCA {
		return bad(ErrSigner, "it is a CA")
	}
	if len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageTimeStamping || len(c.UnknownExtKeyUsage) != 0 {
		return bad(ErrSigner, "its extended key usage is not timeStamping alone")
	}
	for _, e := range c.Extensions {
		if e.Id.Equal(oidExtKeyUsage) && !e.Critical {
			return bad(ErrSigner, "its extended key usage is not critical")
		}
	}
	const signs = x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment
	if c.KeyUsage != 0 && (c.KeyUsage&signs == 0 || c.KeyUsage&^signs != 0) {
		return bad(ErrSigner, "its key usage is more or less than signing")
	}
	return nil
}
