package timestamp

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes below
	_ "crypto/sha512"
	"crypto/x509"
	"encoding/asn1"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidTSTInfo       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 1, 4}
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSigningTime   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
	oidSigningCert   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 12}
	oidSigningCertV2 = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 47}
	oidExtKeyUsage   = asn1.ObjectIdentifier{2, 5, 29, 37}

	oidSHA1   = asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}
	oidMD5    = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 5}
	oidSHA256 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidSHA384 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}
	oidSHA512 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3}

	oidRSA     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidEd25519 = asn1.ObjectIdentifier{1, 3, 101, 112}
)

// signatureOIDs are the algorithms that name their own hash.
var signatureOIDs = []struct {
	oid  asn1.ObjectIdentifier
	hash crypto.Hash
	alg  x509.SignatureAlgorithm
	rsa  bool
}{
	{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}, crypto.SHA256, x509.ECDSAWithSHA256, false},
	{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}, crypto.SHA384, x509.ECDSAWithSHA384, false},
	{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 4}, crypto.SHA512, x509.ECDSAWithSHA512, false},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, crypto.SHA256, x509.SHA256WithRSA, true},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 12}, crypto.SHA384, x509.SHA384WithRSA, true},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 13}, crypto.SHA512, x509.SHA512WithRSA, true},
}

// hashOf maps an OID to a hash. x509's own check of a signature still takes
// SHA-1 (it does for certificates given by the caller), so that the strength is
// decided here, once, for all digests of a token.
func hashOf(oid asn1.ObjectIdentifier) (crypto.Hash, error) {
	switch {
	case oid.Equal(oidSHA256):
		return crypto.SHA256, nil
	case oid.Equal(oidSHA384):
		return crypto.SHA384, nil
	case oid.Equal(oidSHA512):
		return crypto.SHA512, nil
	case oid.Equal(oidSHA1), oid.Equal(oidMD5):
		return 0, bad(ErrWeak, "hash %v", oid)
	}
	return 0, bad(ErrWeak, "hash %v is none of SHA-256, SHA-384 and SHA-512", oid)
}

// oidOf is hashOf the other way round.
func oidOf(h crypto.Hash) asn1.ObjectIdentifier {
	switch h {
	case crypto.SHA256:
		return oidSHA256
	case crypto.SHA384:
		return oidSHA384
	case crypto.SHA512:
		return oidSHA512
	}
	return nil
}

// signatureAlgorithm joins what a SignerInfo says in two places.
func signatureAlgorithm(oid asn1.ObjectIdentifier, digest crypto.Hash) (x509.SignatureAlgorithm, error) {
	for _, s := range signatureOIDs {
		if !s.oid.Equal(oid) {
			continue
		}
		if s.hash != digest {
			return 0, malformed("signature algorithm %v with digest %v", oid, digest)
		}
		return s.alg, nil
	}
	switch {
	case oid.Equal(oidEd25519):
		return x509.PureEd25519, nil
	case oid.Equal(oidRSA):
		for _, s := range signatureOIDs {
			if s.rsa && s.hash == digest {
				return s.alg, nil
			}
		}
	}
	return 0, bad(ErrWeak, "signature algorithm %v", oid)
}

// strongKey says whether a signer's key is one that nobody can forge today.
func strongKey(key any) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return k.Curve.Params().BitSize >= 256
	case *rsa.PublicKey:
		n := k.N.BitLen()
		return n >= minRSABits && n <= maxRSABits
	case ed25519.PublicKey:
		return true
	}
	return false
}

// readAlgorithm reads an AlgorithmIdentifier whose parameters are NULL or absent.
func readAlgorithm(s *cryptobyte.String) (asn1.ObjectIdentifier, bool) {
	var seq, null cryptobyte.String
	var oid asn1.ObjectIdentifier
	if !s.ReadASN1(&seq, der.SEQUENCE) || !seq.ReadASN1ObjectIdentifier(&oid) {
		return nil, false
	}
	if seq.Empty() {
		return oid, true
	}
	return oid, seq.ReadASN1(&null, der.NULL) && len(null) == 0 && seq.Empty()
}
