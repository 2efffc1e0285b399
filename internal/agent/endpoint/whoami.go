package endpoint

import (
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/workload"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// Whoami explains what the caller, or the tool it holds stopped, would get.
func (s *Server) Whoami(ctx context.Context, req *workloadv1.WhoamiRequest) (*workloadv1.WhoamiResponse, error) {
	c, err := measured.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	subj, err := c.MeasureRecorder(ctx, s.attestor, s.cfg.RecorderGID)
	if err != nil {
		return nil, err
	}
	pid, err := c.PID()
	if err != nil {
		return nil, measured.Error(err)
	}
	resp := &workloadv1.WhoamiResponse{Measurement: &workloadv1.Measurement{Executable: subj.Executable[:], Selectors: subj.Selectors}}
	seen := measured.Seen{Base: subj.Selectors}
	if req.GetStep() {
		child, tool, err := c.MeasureTool(ctx, s.attestor)
		if err != nil {
			return nil, err
		}
		pid = child.PID
		child.Close()
		seen.Base = append(slices.Clone(subj.Selectors), measured.RecorderSelector(subj.Executable, subj.Protected))
		seen.Tools = []string{attest.SelectorTool + hex.EncodeToString(tool[:])}
		m := resp.Measurement
		m.Tool, m.Recorder, m.RecorderProtected, m.UnprotectedReason = tool[:], subj.Executable[:], subj.Protected, subj.Reason
		m.Selectors = seen.All()
		if !subj.Protected {
			resp.Notes = append(resp.Notes, "the recorder is not protected: "+subj.Reason)
		}
	}
	// Whoever asks wants to know how it is now, not five seconds ago.
	if err := s.knock(ctx, func(*identity.View) bool { return true }); err != nil {
		resp.Notes = append(resp.Notes, "the server cannot be asked; this is what was known: "+status.Convert(err).Message())
	}
	v, err := s.cfg.Keeper.View()
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	resp.AgentId, resp.TrustDomain = v.AgentID.String(), v.TrustDomain.Name()
	usable := false
	for _, e := range v.Entries {
		missing := e.Missing(seen.All())
		switch refusal := refusalOf(v, e, req.GetStep(), seen); {
		case len(missing) == 0:
			resp.Matches = append(resp.Matches, match(e, nil, refusal))
			usable = usable || refusal == ""
		case req.GetStep() && refusal == "" && e.StepComplete() && partial(v, e, seen):
			resp.Matches = append(resp.Matches, match(e, missing, "issued once the tool has also run what is missing"))
			usable = true
		}
	}
	if !usable {
		if e := v.Nearest(seen.All(), req.GetStep()); e != nil && len(resp.Matches) == 0 {
			resp.Nearest = match(e, e.Missing(seen.All()), refusalOf(v, e, req.GetStep(), seen))
		}
		name := "workload"
		if img, err := imagePath(pid); err == nil {
			name = img
		}
		resp.EntryCreate = entryCreate(v, seen.All(), req.GetStep(), name)
	}
	if v.Stock && req.GetStep() {
		resp.Notes = append(resp.Notes, identity.ErrNoEvidence.Error()+": what a step signs has its evidence in a file beside it")
	}
	// What was measured is still who asks.
	if err := c.Check(); err != nil {
		return nil, measured.Error(err)
	}
	return resp, nil
}

func partial(v *identity.View, e *identity.Entry, seen measured.Seen) bool {
	_, p := v.Steps(seen)
	return slices.Contains(p, e)
}

func match(e *identity.Entry, missing []string, refusal string) *workloadv1.Match {
	return &workloadv1.Match{EntryId: e.ID, SpiffeId: e.SPIFFEID.String(), Missing: missing, Refusal: refusal}
}

// refusalOf says why an entry would not be issued for although it matches.
func refusalOf(v *identity.View, e *identity.Entry, step bool, seen measured.Seen) string {
	switch {
	case !step && e.Step():
		return "the entry is for recorded steps: it is issued to rootlink run, not over the Workload API"
	case step && !e.Step():
		return "the entry has neither a tool nor a recorder selector: it is issued over the Workload API, not for a step"
	case step && !e.StepComplete():
		return "a step's entry needs both a binary:tool: and a binary:recorder selector"
	}
	if step {
		for _, t := range seen.Tools {
			if !slices.Contains(e.Selectors, t) {
				return "the entry does not name the tool " + t
			}
		}
	}
	return ""
}

// noIdentity is the refusal with the way out: what was measured, and the
// command that an operator runs if that is as it should be.
func noIdentity(v *identity.View, selectors []string, step bool) error {
	what := "no entry matches what was measured"
	if e := v.Nearest(selectors, step); e != nil {
		what = fmt.Sprintf("nothing matches; the nearest entry %s (%s) ", e.ID, e.SPIFFEID)
		if missing := e.Missing(selectors); len(missing) > 0 {
			what += "also needs " + strings.Join(missing, ", ")
		} else {
			what += "does not name every program that ran"
		}
	}
	return status.Error(codes.PermissionDenied, bounded(cli.JoinHint("no identity issued: "+what,
		"if this program should have one, run: "+entryCreate(v, selectors, step, "NAME"))))
}

// entryCreate is the command line that registers what was measured: the hashes
// that say which program it is, and no more than needed. For a workload that
// includes its user: others on the node could run the same file, or have a
// program of their own shown as it (docs/plugin-binary.md).
func entryCreate(v *identity.View, selectors []string, step bool, name string) string {
	kind, want := "workload", []string{attest.SelectorExecutable, "binary:uid:"}
	if step {
		kind, want = "step", []string{attest.SelectorTool, attest.SelectorRecorder, attest.SelectorUnprotectedRecorder}
	}
	form, flag := "rootlink-server entry create --spiffe-id spiffe://%s/%s/%s --parent-id %s", "--selector"
	if v.Stock {
		form, flag = "spire-server entry create -spiffeID spiffe://%s/%s/%s -parentID %s", "-selector"
	}
	b := &strings.Builder{}
	fmt.Fprintf(b, form, v.TrustDomain.Name(), kind, name, v.AgentID)
	for _, s := range selectors {
		if slices.ContainsFunc(want, func(p string) bool { return strings.HasPrefix(s, p) }) {
			fmt.Fprintf(b, " %s %s", flag, s)
		}
	}
	return b.String()
}

// imagePath suggests the last segment of a SPIFFE ID from a program's name. It
// is a suggestion to a person: any process can choose its file name.
func imagePath(pid int) (string, error) {
	name, err := exeName(pid)
	if err != nil {
		return "", err
	}
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '-', r == '_':
			return r
		}
		return '-'
	}, name)
	if len(clean) > 64 {
		clean = clean[:64]
	}
	if strings.Trim(clean, ".") == "" {
		return "", workload.ErrGone
	}
	return clean, nil
}

// exeName is the file name of the program that a process runs, for people only.
func exeName(pid int) (string, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return "", err
	}
	return filepath.Base(strings.TrimSuffix(path, " (deleted)")), nil
}
