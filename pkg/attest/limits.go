package attest

import "time"

// Limits on hostile input, checked before anything is allocated for it.
const (
	MaxLeaves         = 4096             // leaves under one quote
	MaxEvidence       = 64 << 10         // bytes of an evidence record
	MaxParent         = 7 << 10          // bytes of a parent record: certificate and record stay below 8 KiB, see docs/evidence.md
	maxUnixMilli      = 1 << 46          // a time of a record; beyond the year 4000
	MaxParentAge      = 24 * time.Hour   // from the node attestation to the SVID that carries it
	maxPath           = 12               // hashes in the path of a tree of MaxLeaves
	MaxSelectors      = 64               // selectors in a leaf
	MaxSelector       = 1024             // bytes of one selector
	MaxName           = 2048             // bytes of a SPIFFE ID; a trust domain is at most 255
	MaxTrustDomain    = 255              // bytes of a trust domain name
	MaxChain          = 5                // certificates in an EK chain
	MaxCertificate    = 8 << 10          // bytes of one certificate
	MaxDetached       = 64 << 10         // bytes of a detached record
	MaxDetachedToken  = 32 << 10         // bytes of the timestamp token in one
	MaxAgentChain     = 5                // certificates of an agent SVID, intermediates included
	MaxECDSASignature = 72               // bytes of a P-256 signature in DER
	MaxEventLog       = 8 << 20          // bytes of a boot event log
	MaxIMALog         = 64 << 20         // bytes of an IMA log
	LogChunk          = 1 << 20          // bytes of one log chunk on the wire
	NonceLifetime     = 60 * time.Second // how long a server nonce may be used
	NonceBackdate     = 10 * time.Second // SVID notBefore may precede the nonce by this
	MaxSVIDAfterNonce = 60 * time.Second // SVID notBefore may follow the nonce by this
	MaxAKCertLife     = 24 * time.Hour   // life of an AK certificate

	MaxPCR           = 23   // highest PCR index of the PC client profile
	MaxBanks         = 4    // PCR banks in a record
	MaxTPMStructure  = 4096 // bytes of one TPM structure (attest, signature, public, creation data)
	MaxPolicyName    = 256  // bytes of a PCR policy's or profile's name
	MaxProfiles      = 1024 // profiles in a PCR policy
	maxPathSignature = 64   // signature checks spent on one EK chain, against crafted certificate meshes
	maxCARSABits     = 8192 // of a CA's RSA key in an EK chain; checking a signature costs the square of it
	maxCandidates    = 4096 // roots and intermediates looked at for one EK chain
)
