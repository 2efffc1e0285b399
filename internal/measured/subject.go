package measured

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/workload"
	"github.com/rootlink/rootlink/pkg/attest"
)

// Subject is a process as it was measured.
type Subject struct {
	Executable [32]byte
	Selectors  []string // "type:value", sorted, unique
}

// NewSubject reads a plugin's selector values of type "binary". One hash, no
// more and no less, says which executable holds the key.
func NewSubject(values []string) (Subject, error) {
	var s Subject
	found := false
	for _, v := range values {
		if strings.ContainsAny(v, "\n\x00") || len(v) > attest.MaxSelector {
			return s, fmt.Errorf("workload attestor sent a malformed selector %.64q", v)
		}
		// A plugin that spoke of tools or recorders would let any workload
		// pass for a recorded step.
		if strings.HasPrefix(v, "tool:") || strings.HasPrefix(v, "recorder") {
			return s, fmt.Errorf("workload attestor sent %.64q, which only the agent may say", v)
		}
		s.Selectors = append(s.Selectors, "binary:"+v)
		if h, ok := strings.CutPrefix(v, "sha256:"); ok {
			b, err := hex.DecodeString(h)
			if err != nil || len(b) != len(s.Executable) || hex.EncodeToString(b) != h || found {
				return s, errors.New("workload attestor sent a malformed or second sha256 selector")
			}
			found = true
			copy(s.Executable[:], b)
		}
	}
	if !found {
		return s, errors.New("workload attestor did not measure the executable")
	}
	s.Selectors = attest.SortSelectors(s.Selectors)
	return s, nil
}

// FromPlugin is an Attestor that asks a WorkloadAttestor plugin.
func FromPlugin(a workloadattestorv1.WorkloadAttestorClient) Attestor {
	return func(ctx context.Context, pid int) (Subject, error) {
		if err := checkPID(pid); err != nil {
			return Subject{}, err
		}
		resp, err := a.Attest(ctx, &workloadattestorv1.AttestRequest{Pid: int32(pid)})
		if err != nil {
			return Subject{}, attestError(err)
		}
		return subject(resp.GetSelectorValues())
	}
}

// FromMeasurer is an Attestor that looks by itself, within the hashing budget of
// each user.
func FromMeasurer(m *workload.Measurer) Attestor {
	return func(ctx context.Context, pid int) (Subject, error) {
		if err := checkPID(pid); err != nil {
			return Subject{}, err
		}
		got, err := m.Measure(ctx, pid)
		if err != nil {
			return Subject{}, attestError(status.Error(Code(err), cli.JoinHint(err.Error(), workload.Hint(err))))
		}
		return subject(got.Selectors())
	}
}

func checkPID(pid int) error {
	if pid <= 0 || int(int32(pid)) != pid {
		return status.Errorf(codes.PermissionDenied, "no such process: %d", pid)
	}
	return nil
}

func subject(values []string) (Subject, error) {
	s, err := NewSubject(values)
	if err != nil {
		return Subject{}, status.Error(codes.PermissionDenied, err.Error())
	}
	return s, nil
}

// attestError keeps the codes that tell the caller to wait, and denies else.
func attestError(err error) error {
	st := status.Convert(err)
	switch st.Code() {
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Canceled:
		return status.Errorf(st.Code(), "measure the caller: %s", st.Message())
	}
	return status.Errorf(codes.PermissionDenied, "measure the caller: %s", st.Message())
}

// Code is the one place that turns what measuring can fail with into a code.
func Code(err error) codes.Code {
	var ce *workload.CapabilityError
	switch {
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, workload.ErrForeignPID):
		return codes.InvalidArgument
	case errors.Is(err, workload.ErrGone), errors.Is(err, workload.ErrChanged):
		return codes.Aborted
	case errors.Is(err, workload.ErrBudget):
		return codes.ResourceExhausted
	case errors.Is(err, workload.ErrFileSystem), errors.Is(err, workload.ErrTooLarge), errors.As(err, &ce):
		return codes.FailedPrecondition
	}
	return codes.Internal
}
