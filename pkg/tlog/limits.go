package tlog

// Limits on hostile input, checked before anything is allocated for it.
const (
	MaxBody       = 65535     // bytes of an entry; a C2SP entry bundle has 16 bits for it
	MaxEntryJSON  = 256 << 10 // bytes of a TransparencyLogEntry in JSON
	MaxCheckpoint = 32 << 10  // bytes of a signed checkpoint: 100 signatures fit
	MaxProof      = 64        // hashes in a proof: one for each bit of the index
	MaxSignature  = 512       // bytes of a signature in an entry
	MinSignature  = 8         // bytes of the shortest DER ECDSA signature
	MaxWitnesses  = 256       // known to one verification
	MaxLogs       = 256       // known to one verification
	MaxVKey       = 1024      // bytes of a witness's key in text
	MaxOrigin     = 255       // bytes of a log's name

	hashSize = 32
)
