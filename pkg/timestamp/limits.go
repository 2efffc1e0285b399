package timestamp

import "time"

// Limits on hostile input, checked before anything is allocated for it.
const (
	MaxToken    = 32 << 10    // bytes of a TimeStampResp; one with a chain of four RSA-4096 certificates has 8 KiB
	MaxChain    = 5           // certificates in an authority's chain
	MaxAccuracy = time.Minute // a token that says less precisely when is no use to an SVID that lives ten

	maxEmbedded   = 8       // certificates inside a token
	maxAttributes = 16      // signed attributes
	maxSerial     = 21      // bytes: RFC 3161 asks users to bear 160 bits, and DER adds a sign
	maxNonce      = 64      // bytes
	maxExtensions = 8       // of a TSTInfo
	maxESSCerts   = 8       // certificates that a signing-certificate attribute names
	minRSABits    = 2048    // of a signer's key
	maxRSABits    = 8192    // checking a signature costs the square of it
	maxText       = 1 << 10 // bytes of a refusal's text that are kept
)
