package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/config"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
)

// says is a workload attestor that answers this.
type says struct {
	values []string
	err    error
}

func (s says) Attest(context.Context, *workloadattestorv1.AttestRequest, ...grpc.CallOption) (*workloadattestorv1.AttestResponse, error) {
	return &workloadattestorv1.AttestResponse{SelectorValues: s.values}, s.err
}

var executable = "sha256:" + strings.Repeat("ab", 32)

func TestSelectorsOfAllAttestorsAreMerged(t *testing.T) {
	p := &Plugins{WorkloadAttestor: says{values: []string{executable}}, others: []namedAttestor{
		{"unix", says{values: []string{"uid:0", "binary:" + executable}}}, {"quiet", says{}},
	}}
	s, err := p.Measure()(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	// What calls itself another attestor's is still this one's.
	want := []string{"binary:" + executable, "unix:binary:" + executable, "unix:uid:0"}
	if !slices.Equal(s.Selectors, want) {
		t.Errorf("got %q", s.Selectors)
	}
}

// TestRefusesPartOfTheSelectors: an attestor that fails must not look like one
// that has nothing to say.
func TestRefusesPartOfTheSelectors(t *testing.T) {
	for name, c := range map[string]struct {
		other says
		code  codes.Code
	}{
		"down":        {says{err: status.Error(codes.Unavailable, "plugin is down")}, codes.Unavailable},
		"failing":     {says{err: errors.New("oops")}, codes.Unavailable},
		"empty":       {says{values: []string{""}}, codes.Internal},
		"control":     {says{values: []string{"uid:0\nbinary:x"}}, codes.Internal},
		"not UTF-8":   {says{values: []string{"\xff"}}, codes.Internal},
		"oversized":   {says{values: []string{strings.Repeat("x", 1024)}}, codes.Internal},
		"very many":   {says{values: slices.Repeat([]string{"x"}, maxSelectors+1)}, codes.Internal},
		"out of time": {says{err: context.DeadlineExceeded}, codes.Unavailable},
	} {
		p := &Plugins{WorkloadAttestor: says{values: []string{executable}}, others: []namedAttestor{{"other", c.other}, {"fine", says{values: []string{"a"}}}}}
		s, err := p.Measure()(t.Context(), 1)
		if status.Code(err) != c.code || len(s.Selectors) != 0 {
			t.Errorf("%s: %v, %q", name, err, s.Selectors)
		}
	}
}

func TestRefusesPluginBlocks(t *testing.T) {
	block := func(typ, name, cmd string) config.Plugin {
		return config.Plugin{Type: typ, Name: name, Cmd: cmd, Enabled: true}
	}
	off := config.Plugin{Type: "WorkloadAttestor", Name: "binary"}
	for name, blocks := range map[string][]config.Plugin{
		"unknown built-in":             {block("WorkloadAttestor", "docker", "")},
		"unix as another type":         {block("NodeAttestor", "unix", "")},
		"unknown type":                 {block("SVIDStore", "aws", "/x")},
		"two node attestors":           {block("NodeAttestor", "tpmnode", ""), block("NodeAttestor", "x509pop", "/x")},
		"binary off":                   {off},
		"node attestor off":            {{Type: "NodeAttestor", Name: "tpmnode"}},
		"selectors of the TPM":         {block("WorkloadAttestor", "tpmnode", "/x")},
		"selectors of another node":    {block("WorkloadAttestor", "x509pop", "/x"), block("NodeAttestor", "x509pop", "/x")},
		"selectors that name an agent": {block("WorkloadAttestor", "spiffe_id", "/x")},
	} {
		var c PluginConfig
		if err := c.Override(blocks); cli.ExitCode(err) != cli.ExitUsage {
			t.Errorf("%s: %v", name, err)
		}
	}
	var c PluginConfig
	err := c.Override([]config.Plugin{
		{Type: "NodeAttestor", Name: "tpmnode"}, block("NodeAttestor", "x509pop", "/x"), block("WorkloadAttestor", "unix", "/x"), block("WorkloadAttestor", "binary", "/y"),
	})
	if err != nil || c.node.Name != "x509pop" || c.binary.Cmd != "/y" || len(c.others) != 1 {
		t.Errorf("%v, %+v", err, c)
	}
}

// TestReloadTakesWhatIsRightAndKeepsTheRest with the built-in "binary".
func TestReloadTakesWhatIsRightAndKeepsTheRest(t *testing.T) {
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(&log, nil))
	p := &Plugins{}
	if err := p.loadWorkloadAttestor(t.Context(), testTD, config.Plugin{}, binary.New(), logger); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	data := ""
	c := PluginConfig{Reread: func() ([]config.Plugin, error) {
		if data == "unreadable" {
			return nil, errors.New("no such file")
		}
		return []config.Plugin{{Type: "WorkloadAttestor", Name: "binary", Enabled: true, Data: data}}, nil
	}}
	for _, step := range []struct{ data, want string }{
		{"", ""},
		{"unreadable", "keep what they have"},
		{"nonsense = 1", "not taken"},
		{"# a comment", "new plugin_data taken"},
	} {
		log.Reset()
		data = step.data
		p.reload(t.Context(), c, logger)
		if !strings.Contains(log.String(), step.want) || step.want == "" && log.Len() > 0 {
			t.Errorf("%q: %s", step.data, &log)
		}
	}
}
