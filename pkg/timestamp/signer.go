package timestamp

import "crypto/sha256"

// UnverifiedSigner is the SHA-256 of the certificate inside the token that the
// token says signed it, zero without one. Whoever collects tokens tells by it
// that two are of one authority; to judge that is Verify's affair.
func (t *Token) UnverifiedSigner() [32]byte {
	for _, c := range t.certificates {
		if t.names(c) {
			return sha256.Sum256(c.Raw)
		}
	}
	return [32]byte{}
}
