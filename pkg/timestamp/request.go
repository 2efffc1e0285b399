package timestamp

import (
	"crypto"
	"encoding/asn1"
	"fmt"
	"math/big"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// Media types of RFC 3161, 3.4.
const (
	QueryType = "application/timestamp-query"
	ReplyType = "application/timestamp-reply"
)

// Request is the DER of a TimeStampReq for a signature: SHA-256 of it, the given
// nonce, and the wish for the authority's certificate inside the token.
func Request(signature []byte, nonce *big.Int) ([]byte, error) {
	h := crypto.SHA256.New()
	h.Write(signature)
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(oidOf(crypto.SHA256))
				b.AddASN1NULL()
			})
			b.AddASN1OctetString(h.Sum(nil))
		})
		if nonce != nil {
			b.AddASN1BigInt(nonce)
		}
		b.AddASN1Boolean(true)
	})
	return b.Bytes()
}

// Answers says whether the token is what an authority should have answered to
// Request(signature, nonce): it is for the signature, holds the nonce, and is
// signed by a certificate inside it that may sign timestamps. It says nothing
// about who that is. Whoever asks for a token checks this before relying on it;
// whoever relies on it later calls Verify.
func (t *Token) Answers(signature []byte, nonce *big.Int) error {
	if err := t.covers(signature); err != nil {
		return err
	}
	if nonce != nil && (t.nonce == nil || t.nonce.Cmp(nonce) != 0) {
		return bad(ErrNonce, "nonce %v", t.nonce)
	}
	for _, c := range t.certificates {
		if t.names(c) {
			return t.signedBy(c)
		}
	}
	return bad(ErrSigner, "the token holds no certificate of its signer")
}

// MaxQuery bounds a TimeStampReq: a hash, a nonce, a policy.
const MaxQuery = 2 << 10 // bytes

// Query is a TimeStampReq, RFC 3161, 2.4.1.
type Query struct {
	Hash      crypto.Hash
	Imprint   []byte
	Policy    asn1.ObjectIdentifier // nil: any
	Nonce     *big.Int              // nil: none
	CertReq   bool                  // the authority's certificate is wanted in the token
	Extension bool                  // there are extensions, of which none is known
}

// ParseQuery reads the DER of a TimeStampReq. The error is ErrMalformed,
// ErrWeak for a hash that is not served, or ErrVersion.
func ParseQuery(raw []byte) (*Query, error) {
	if len(raw) > MaxQuery {
		return nil, malformed("a request of %d bytes, at most %d", len(raw), MaxQuery)
	}
	in := cryptobyte.String(append([]byte(nil), raw...))
	q := new(Query)
	var req, imprint, extensions cryptobyte.String
	var version int
	if !in.ReadASN1(&req, der.SEQUENCE) || !in.Empty() || !req.ReadASN1Integer(&version) {
		return nil, malformed("no TimeStampReq")
	}
	if version != 1 {
		return nil, fmt.Errorf("%w: %d", ErrVersion, version)
	}
	if !req.ReadASN1(&imprint, der.SEQUENCE) {
		return nil, malformed("message imprint")
	}
	oid, ok := readAlgorithm(&imprint)
	if !ok || !imprint.ReadASN1((*cryptobyte.String)(&q.Imprint), der.OCTET_STRING) || !imprint.Empty() {
		return nil, malformed("message imprint")
	}
	var err error
	if q.Hash, err = hashOf(oid); err != nil {
		return nil, err
	}
	if len(q.Imprint) != q.Hash.Size() {
		return nil, malformed("an imprint of %d bytes by %v", len(q.Imprint), q.Hash)
	}
	if req.PeekASN1Tag(der.OBJECT_IDENTIFIER) && !req.ReadASN1ObjectIdentifier(&q.Policy) {
		return nil, malformed("policy")
	}
	if req.PeekASN1Tag(der.INTEGER) {
		if q.Nonce, err = readBig(&req, maxNonce); err != nil {
			return nil, malformed("nonce: %w", err)
		}
	}
	// OpenSSL and others write the default out: DER forbids it, and nothing
	// hangs on it in a request.
	if req.PeekASN1Tag(der.BOOLEAN) && !req.ReadASN1Boolean(&q.CertReq) {
		return nil, malformed("certReq")
	}
	if !req.ReadOptionalASN1(&extensions, &q.Extension, tag(0)) || !req.Empty() {
		return nil, malformed("the request has more than it may")
	}
	return q, nil
}
