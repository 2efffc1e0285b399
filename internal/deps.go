// Package internal pins the modules chosen in docs/design.md until each is used.
package internal

import (
	_ "github.com/google/go-attestation/attest"
	_ "github.com/in-toto/in-toto-golang/in_toto"
	_ "github.com/prometheus/client_golang/prometheus"
	_ "github.com/spiffe/go-spiffe/v2/workloadapi"
)
