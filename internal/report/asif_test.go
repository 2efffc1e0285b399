package report

import (
	"strings"
	"testing"

	"github.com/rootlink/rootlink/pkg/layout"
)

// A page made with --at looks like any other, years later and in another's
// hands: it must say that it is about a time that was asked for.
func TestRefusesToPassAnotherTimeForThePresent(t *testing.T) {
	r := result(1)
	if strings.Contains(pageOf(t, r, Options{}), "AS IF IT WERE") {
		t.Error("said of the present")
	}
	r.AsIf = when.AddDate(-1, 0, 0)
	if page := pageOf(t, r, Options{}); !strings.Contains(page, "AS IF IT WERE 2029-05-01 12:00:00Z") {
		t.Error("the page does not say which time was asked for")
	}
}

func TestRefusesToPassAnotherTimeOfALayoutForThePresent(t *testing.T) {
	r, steps := FromLayout(&layout.Result{AsIf: when}, when)
	if !strings.Contains(pageOf(t, r, Options{Steps: steps}), "AS IF IT WERE 2030-05-01 12:00:00Z") {
		t.Error("the page does not say which time was asked for")
	}
}
