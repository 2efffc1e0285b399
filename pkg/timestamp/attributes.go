package timestamp

import (
	"bytes"
	"crypto/subtle"
	"encoding/asn1"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// readAttributes reads the signed attributes, RFC 5652, 5.3 and 11, and checks
// those that speak of the content. Each type occurs once and they are sorted as
// DER wants it, so that all readers hash the same bytes and see the same values.
func (t *Token) readAttributes(s cryptobyte.String) error {
	var previous []byte
	var types []asn1.ObjectIdentifier
	var contentType, messageDigest bool
	for !s.Empty() {
		var element, attr, values cryptobyte.String
		var oid asn1.ObjectIdentifier
		if len(types) == maxAttributes || !s.ReadASN1Element(&element, der.SEQUENCE) {
			return malformed("signed attributes")
		}
		if bytes.Compare(previous, element) >= 0 {
			return malformed("signed attributes are not in order")
		}
		previous = element
		if !element.ReadASN1(&attr, der.SEQUENCE) || !attr.ReadASN1ObjectIdentifier(&oid) ||
			!attr.ReadASN1(&values, der.SET) || !attr.Empty() {
			return malformed("signed attribute")
		}
		for _, seen := range types {
			if seen.Equal(oid) {
				return malformed("two signed attributes %v", oid)
			}
		}
		types = append(types, oid)
		var err error
		switch {
		case oid.Equal(oidContentType):
			var content asn1.ObjectIdentifier
			if !values.ReadASN1ObjectIdentifier(&content) || !values.Empty() || !content.Equal(oidTSTInfo) {
				return malformed("the signature is for other content than a TSTInfo")
			}
			contentType = true
		case oid.Equal(oidMessageDigest):
			var want cryptobyte.String
			if !values.ReadASN1(&want, der.OCTET_STRING) || !values.Empty() {
				return malformed("message digest")
			}
			h := t.digest.New()
			h.Write(t.content)
			if subtle.ConstantTimeCompare(h.Sum(nil), want) != 1 {
				return bad(ErrSignature, "it is for another TSTInfo")
			}
			messageDigest = true
		case oid.Equal(oidSigningTime):
			err = t.readSigningTime(values)
		case oid.Equal(oidSigningCert):
			err = t.readSigningCert(values, true)
		case oid.Equal(oidSigningCertV2):
			err = t.readSigningCert(values, false)
		}
		if err != nil {
			return err
		}
	}
	if !contentType || !messageDigest {
		return malformed("the signed attributes lack the content's type or digest")
	}
	if len(t.signers) == 0 {
		return malformed("the signed attributes do not name the signer's certificate")
	}
	return nil
}

func (t *Token) readSigningTime(values cryptobyte.String) error {
	ok := false
	if values.PeekASN1Tag(der.UTCTime) {
		ok = values.ReadASN1UTCTime(&t.signingTime)
	} else {
		ok = values.ReadASN1GeneralizedTime(&t.signingTime)
	}
	if !ok || !values.Empty() {
		return malformed("signing time")
	}
	return nil
}

// readSigningCert reads SigningCertificate or SigningCertificateV2, RFC 5035. The
// first certificate named is the signer's; the others would be its chain, which
// is found without them.
func (t *Token) readSigningCert(values cryptobyte.String, v1 bool) error {
	var sc, ids cryptobyte.String
	if !values.ReadASN1(&sc, der.SEQUENCE) || !values.Empty() || !sc.ReadASN1(&ids, der.SEQUENCE) || ids.Empty() {
		return malformed("signing certificate")
	}
	for n := 0; !ids.Empty(); n++ {
		var id cryptobyte.String
		if n == maxESSCerts || !ids.ReadASN1(&id, der.SEQUENCE) {
			return malformed("signing certificate")
		}
		c := certID{sha1: v1, hash: 0}
		if !v1 {
			oid := oidSHA256
			if id.PeekASN1Tag(der.SEQUENCE) {
				var ok bool
				if oid, ok = readAlgorithm(&id); !ok {
					return malformed("signing certificate")
				}
			}
			var err error
			if c.hash, err = hashOf(oid); err != nil {
				return err
			}
		}
		if !id.ReadASN1((*cryptobyte.String)(&c.digest), der.OCTET_STRING) {
			return malformed("signing certificate")
		}
		if n == 0 {
			t.signers = append(t.signers, c)
		}
	}
	return nil
}
