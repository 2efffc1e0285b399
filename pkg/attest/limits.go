package attest

import "time"

// Limits on hostile input, checked before anything is allocated for it.
const (
	MaxLeaves         = 4096             // leaves under one quote
	MaxEvidence       = 64 << 10         // bytes of an evidence record
	MaxSelectors      = 64               // selectors in a leaf
	MaxSelector       = 1024             // bytes of one selector
	MaxChain          = 5                // certificates in an EK chain
	MaxCertificate    = 8 << 10          // bytes of one certificate
	MaxEventLog       = 8 << 20          // bytes of a boot event log
	MaxIMALog         = 64 << 20         // bytes of an IMA log
	LogChunk          = 1 << 20          // bytes of one log chunk on the wire
	NonceLifetime     = 60 * time.Second // how long a server nonce may be used
	NonceBackdate     = 10 * time.Second // SVID notBefore may precede the nonce by this (§4.4)
	MaxSVIDAfterNonce = 60 * time.Second // SVID notBefore may follow the nonce by this (§4.4)
)
