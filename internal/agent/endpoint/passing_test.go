package endpoint

import (
	"fmt"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestPassingRefusal: a recorder waits while the agent attests again, such as
// after a reset of the TPM, and does not wait for a ban to end.
func TestPassingRefusal(t *testing.T) {
	for reason, want := range map[types.PermissionDeniedDetails_Reason]codes.Code{
		types.PermissionDeniedDetails_AGENT_NOT_ATTESTED:  codes.Unavailable,
		types.PermissionDeniedDetails_AGENT_NOT_ACTIVE:    codes.Unavailable,
		types.PermissionDeniedDetails_AGENT_EXPIRED:       codes.Unavailable,
		types.PermissionDeniedDetails_AGENT_MUST_REATTEST: codes.Unavailable,
		types.PermissionDeniedDetails_AGENT_BANNED:        codes.PermissionDenied,
	} {
		st, err := status.New(codes.PermissionDenied, "refused").WithDetails(&types.PermissionDeniedDetails{Reason: reason})
		if err != nil {
			t.Fatal(err)
		}
		if got := status.Code(issueError(fmt.Errorf("get a nonce: %w", st.Err()))); got != want {
			t.Errorf("%s: %s, want %s", reason, got, want)
		}
	}
	if got := status.Code(issueError(status.Error(codes.PermissionDenied, "pcr_policy"))); got != codes.PermissionDenied {
		t.Errorf("a refusal of the evidence: %s", got)
	}
}
