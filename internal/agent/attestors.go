package agent

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/pkg/attest"
)

const (
	// maxSelectors is what one other attestor may say of one process.
	maxSelectors = 256
	// otherTimeout bounds what each other attestor may take: a workload that
	// set no deadline must not wait for ever.
	otherTimeout = 10 * time.Second
)

// namedAttestor is a workload attestor beside "binary". Its name is the type of
// all its selectors, whatever it says.
type namedAttestor struct {
	name   string
	client workloadattestorv1.WorkloadAttestorClient
}

// Measure asks every workload attestor about a process: "binary" says which
// executable it is, the others add selectors.
//
// When one of them fails, the process gets no answer rather than one with fewer
// selectors. Fewer selectors never mean more identities, but they mean others
// than the operator's: a workload that would lose an SVID that it holds, or be
// told "no" for good, is better told to ask again.
func (p *Plugins) Measure() measured.Attestor {
	first := measured.FromPlugin(p.WorkloadAttestor)
	if len(p.others) == 0 {
		return first
	}
	return func(ctx context.Context, pid int) (measured.Subject, error) {
		s, err := first(ctx, pid)
		if err != nil {
			return measured.Subject{}, err
		}
		type answer struct {
			selectors []string
			err       error
		}
		answers := make([]chan answer, len(p.others))
		for i, o := range p.others {
			answers[i] = make(chan answer, 1)
			go func() {
				selectors, err := o.attest(ctx, pid)
				answers[i] <- answer{selectors, err}
			}()
		}
		for _, ch := range answers {
			a := <-ch // comes: attest has a deadline
			if a.err != nil {
				return measured.Subject{}, a.err
			}
			s.Selectors = append(s.Selectors, a.selectors...)
		}
		s.Selectors = attest.SortSelectors(s.Selectors)
		return s, nil
	}
}

func (o namedAttestor) attest(ctx context.Context, pid int) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, otherTimeout)
	defer cancel()
	resp, err := o.client.Attest(ctx, &workloadattestorv1.AttestRequest{Pid: int32(pid)})
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "workload attestor %q: %s", o.name, status.Convert(err).Message())
	}
	values := resp.GetSelectorValues()
	if len(values) > maxSelectors {
		return nil, status.Errorf(codes.Internal, "workload attestor %q sent %d selectors, at most %d are taken", o.name, len(values), maxSelectors)
	}
	out := make([]string, 0, len(values))
	for _, v := range values {
		if err := checkSelector(o.name, v); err != nil {
			return nil, status.Errorf(codes.Internal, "workload attestor %q sent %v", o.name, err)
		}
		out = append(out, o.name+":"+v)
	}
	return out, nil
}

// checkSelector takes what an entry could name and evidence could hold.
func checkSelector(name, v string) error {
	switch {
	case v == "":
		return fmt.Errorf("an empty selector")
	case len(name)+1+len(v) > attest.MaxSelector:
		return fmt.Errorf("a selector of %d bytes", len(v))
	case !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl):
		return fmt.Errorf("a malformed selector %.64q", v)
	}
	return nil
}
