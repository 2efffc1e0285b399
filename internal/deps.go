// Package internal pins the modules chosen in docs/design.md until each is used.
package internal

import (
	_ "github.com/fxamacker/cbor/v2"
	_ "github.com/google/go-attestation/attest"
	_ "github.com/google/go-eventlog/tcg"
	_ "github.com/in-toto/in-toto-golang/in_toto"
	_ "github.com/prometheus/client_golang/prometheus"
	_ "github.com/rogpeppe/go-internal/testscript"
	_ "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	_ "github.com/spiffe/go-spiffe/v2/workloadapi"
	_ "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	_ "golang.org/x/sync/errgroup"
	_ "golang.org/x/time/rate"
	_ "modernc.org/sqlite"
)
