package link

import (
	"time"

	"github.com/rootlink/rootlink/pkg/strictjson"
)

// Limits on hostile input, checked before anything is allocated for it.
const (
	MaxBundle      = 32 << 20 // bytes of a bundle file
	MaxStatement   = 20 << 20 // bytes of a statement; base64 of it fits MaxBundle
	MaxTrust       = 8 << 20  // bytes of trust.json
	MaxTrustFile   = 12 << 20 // bytes of trust.json or revocations with signatures: base64
	MaxRevocations = 4 << 20  // bytes of a revocation file
	MaxDepth       = strictjson.MaxDepth

	MaxSubjects             = 1024    // sigstore-go refuses more
	MaxMaterials            = 1 << 16 // what bulk trees are folded to a dirHash for
	MaxName                 = 4096    // bytes of a subject's or material's name (PATH_MAX)
	MaxStepName             = 256     // bytes
	MaxTypeURI              = 512     // bytes of a predicate type
	MaxTypes                = 64      // predicate types that one identity may sign
	MaxCommand              = 1 << 14 // arguments
	MaxDigests              = 8       // digests of one resource
	MaxExecutables          = 1 << 14 // executables recorded in one step
	MaxTreeGaps             = 64      // reasons why there may be more
	MaxCaches               = 64      // caches of one step
	MaxLeaf                 = 80 << 10
	MaxSignature            = 512       // bytes; a DER P-256 signature needs 72
	MaxTokens               = 16        // timestamp tokens in a bundle
	MaxToken                = 64 << 10  // bytes of one, certificates included
	MaxLogEntries           = 8         // in a bundle
	MaxLogEntry             = 256 << 10 // bytes of one: a body of 64 KiB, a path, cosignatures
	MaxRequirements         = 4096
	MaxPolicies             = 4096 // PCR policy revisions
	MaxAuthorities          = 8192 // SVID authorities: stock SPIRE makes one each 20 hours
	MaxCAs                  = 1024 // attestation CAs, and as many EK roots and intermediates
	MaxIDs                  = 1 << 16
	MaxTrustKeys            = 4  // keys that may sign trust.json
	MaxLogProofs            = 16 // log entries beside a bundle
	MaxTimestampAuthorities = 256
	MaxLinks                = 256  // in one verification
	MaxPattern              = 2048 // SPIFFE ID limit of the SPIFFE-ID specification
)

// MaxClockSkew is how far the verifier's clock may be behind that of whoever
// issued trust.json.
const MaxClockSkew = time.Minute
