package report

import (
	"fmt"
	"strings"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
)

// FromLayout gives a pipeline's result the form of one about links, with its
// steps beside it. now is when it was verified.
func FromLayout(r *layout.Result, now time.Time) (*link.Result, []Step) {
	out := &link.Result{
		SchemaVersion: link.ResultSchema, Verdict: r.Verdict, Trust: r.Trust, Links: r.Links,
		Time: link.TimeInfo{At: now.UTC(), Source: "each link at its own time"}, AsIf: r.AsIf,
	}
	if f := r.Failure; f != nil {
		message := f.Message
		for _, about := range []struct{ what, name string }{{"step", f.Step}, {"rule", f.Rule}, {"file", f.File}} {
			if about.name != "" && !strings.Contains(message, about.name) {
				message = about.what + " " + about.name + ": " + message
			}
		}
		out.Failure = &link.Failure{Class: f.Class, Check: f.Check, Link: f.Link, Message: message}
	}
	for _, a := range r.Artifacts {
		m := link.ArtifactResult{Artifact: a.Artifact}
		if a.Link != "" {
			m.Matches = []link.Match{{Link: a.Link, Subject: a.Subject}}
		}
		out.Artifacts = append(out.Artifacts, m)
	}
	for _, c := range r.Checks {
		line := attest.Check{ID: c.ID, Clause: c.Clause, Outcome: c.Outcome, Detail: c.Detail}
		if c.Step != "" {
			line.ID = c.Step + ": " + c.ID
		}
		out.Checks = append(out.Checks, line)
	}
	if len(r.Layouts) > 0 {
		out.Identity = "layout " + r.Layouts[0].Name
	}
	return out, stepsOf(r)
}

func stepsOf(r *layout.Result) (steps []Step) {
	for _, s := range r.Steps {
		detail := strings.Join(s.SignedBy, ", ")
		if s.Threshold > 1 {
			detail = fmt.Sprintf("%d of %d: %s", len(s.SignedBy), s.Threshold, detail)
		}
		if s.Sublayout != "" {
			detail = "layout " + s.Sublayout
		}
		if s.Unproved {
			detail += " (pinned key: no hardware evidence)"
		}
		ok := s.Verdict == link.VerdictVerified
		for _, c := range r.Checks {
			if c.Step == s.Name && c.Outcome == attest.Failed {
				ok, detail = false, c.Detail
				break
			}
		}
		steps = append(steps, Step{Name: s.Name, Detail: detail, OK: ok})
	}
	return steps
}
