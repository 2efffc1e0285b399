package wire

import (
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// MustAttest is the Quoter's answer while no certificate stands for the AK, so
// that nobody would believe a quote: at the start, when the certificate has
// expired, and when the TPM was cleared under a running agent.
func MustAttest(why string) error {
	st := status.Newf(codes.FailedPrecondition, "%s: the node must attest first", why)
	if d, err := st.WithDetails(&types.PermissionDeniedDetails{Reason: types.PermissionDeniedDetails_AGENT_MUST_REATTEST}); err == nil {
		st = d
	}
	return st.Err()
}

// IsMustAttest recognises it.
func IsMustAttest(err error) bool {
	for _, d := range status.Convert(err).Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok {
			return d.GetReason() == types.PermissionDeniedDetails_AGENT_MUST_REATTEST
		}
	}
	return false
}
