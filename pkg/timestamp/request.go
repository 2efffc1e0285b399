package timestamp

import (
	"crypto"
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
