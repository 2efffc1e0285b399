package oci

import (
	"time"

	"github.com/rootlink/rootlink/pkg/link"
)

// Limits on what a layout or a registry, which may be anybody's, can make us
// read. They are checked before anything is allocated.
const (
	maxManifest  = 4 << 20 // bytes of a manifest or index, as registries have it
	maxEntries   = 4096    // descriptors in one index
	maxDepth     = 4       // indexes within indexes
	maxBlobs     = 1 << 14 // blobs of one image
	maxReferrers = 1024    // referrers that are looked at
	maxBundle    = link.MaxBundle
	maxCompanion = 32 << 20 // bytes of a file that lies beside a bundle
	maxFetched   = 256 << 20
	maxRequests  = 8192             // HTTP requests of one operation
	maxReceived  = 512 << 20        // bytes of all answers of one operation
	maxTime      = 10 * time.Minute // of one operation with a registry
	maxRedirects = 5
	maxRefLength = 4096
)
