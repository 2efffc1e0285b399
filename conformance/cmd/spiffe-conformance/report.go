package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/conformance/suite"
)

// report is a whole run; its JSON form is what --output json writes.
type report struct {
	Socket   string                `json:"socket"`
	Conforms bool                  `json:"conforms"`
	Counts   map[suite.Outcome]int `json:"counts"`
	Results  []line                `json:"results"`
	Wrong    []string              `json:"deviations_wrong,omitempty"`
}

type line struct {
	ID       string        `json:"id"`
	Level    suite.Level   `json:"level"`
	Outcome  suite.Outcome `json:"outcome"`
	Says     string        `json:"says"`
	Why      string        `json:"why,omitempty"`
	Expected string        `json:"expected,omitempty"`
}

// judge compares with the deviations that are known. One that is gone is an
// error as well: the file would go on excusing what nobody looks at.
func judge(results []suite.Result, c *config) report {
	rep := report{Socket: c.Socket, Counts: map[suite.Outcome]int{}}
	failed := map[string]bool{}
	for _, r := range results {
		l := line{ID: r.ID, Level: r.Level, Outcome: r.Outcome, Says: r.Says, Why: r.Why}
		if r.Outcome == suite.Fail {
			failed[r.ID] = true
			l.Expected = c.deviations[r.ID]
			if l.Expected == "" && c.expect != "" {
				rep.Wrong = append(rep.Wrong, r.ID+" fails, and is not expected to")
			}
		}
		rep.Counts[r.Outcome]++
		rep.Results = append(rep.Results, l)
	}
	for id := range c.deviations {
		if !failed[id] {
			rep.Wrong = append(rep.Wrong, id+" is expected to fail, and does not")
		}
	}
	slices.Sort(rep.Wrong)
	if c.expect != "" {
		rep.Conforms = len(rep.Wrong) == 0
	} else {
		rep.Conforms = len(failed) == 0
	}
	return rep
}

func (rep report) write(w io.Writer, form string) error {
	if form == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(rep)
	}
	var b strings.Builder
	for _, l := range rep.Results {
		fmt.Fprintf(&b, "%-7s  %-58s  %s\n", l.Outcome, l.ID, l.Says)
		if l.Why != "" {
			fmt.Fprintf(&b, "%9s%s\n", "", l.Why)
		}
		if l.Expected != "" {
			fmt.Fprintf(&b, "%9sexpected: %s\n", "", l.Expected)
		}
	}
	for _, wrong := range rep.Wrong {
		fmt.Fprintln(&b, "wrong    ", wrong)
	}
	n := rep.Counts
	fmt.Fprintf(&b, "\n%d clauses: %d pass, %d fail, %d advice, %d not run\n", len(rep.Results), n[suite.Pass], n[suite.Fail], n[suite.Advice], n[suite.NotRun])
	_, err := io.WriteString(w, b.String())
	return err
}

var errDeviation = errors.New("a line is a clause's ID and the reason, or begins with #")

// readDeviations reads lines of an ID and a reason. An ID that no clause has is
// an error: it would be a deviation that nobody can ever find.
func readDeviations(b []byte) (map[string]string, error) {
	known := map[string]bool{}
	for _, c := range suite.Clauses() {
		known[c.ID] = c.Level == suite.Must
	}
	out := map[string]string{}
	for text := range strings.Lines(string(b)) {
		text = strings.TrimSpace(text)
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		id, reason, _ := strings.Cut(text, " ")
		reason = strings.TrimSpace(reason)
		if reason == "" || !known[id] || out[id] != "" {
			return nil, fmt.Errorf("%w: %q (the ID of a MUST, once, with a reason)", errDeviation, text)
		}
		out[id] = reason
	}
	return out, nil
}
