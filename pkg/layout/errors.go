package layout

import (
	"errors"
	"fmt"

	"github.com/rootlink/rootlink/pkg/link"
)

// What a caller branches on, besides link.ErrMalformed, link.ErrCrypto and
// link.ErrPolicy, of which every failure is one.
var (
	// ErrUnsigned: a layout that nobody signed is a wish.
	ErrUnsigned = errors.New("the layout is not signed")
	// ErrForeign: signed, and by none of the keys that may.
	ErrForeign = errors.New("the layout is signed by no key that may sign layouts")
	// ErrExpired: the layout is past its end.
	ErrExpired = errors.New("the layout has expired")
	// ErrRolledBack: a newer layout of that name was seen before.
	ErrRolledBack = errors.New("the layout was rolled back")
	// ErrEmpty: no steps, or none that anybody may do: it would demand nothing.
	ErrEmpty = errors.New("the layout demands nothing")
	// ErrThreshold: too few different functionaries vouch for a step.
	ErrThreshold = errors.New("threshold not met")
	// ErrDisagree: links of one step differ in what went in or came out.
	ErrDisagree = errors.New("the links of one step disagree")
	// ErrRule: an artifact rule was broken.
	ErrRule = errors.New("artifact rule broken")
	// ErrNoOverlap: a MATCH rule has nothing to compare, and so proves nothing.
	ErrNoOverlap = errors.New("artifact rule without overlap")
	// ErrEscape: a recorded name that leaves the tree.
	ErrEscape = errors.New("the name leaves the tree")
	// ErrBuildID: links of different runs of the pipeline.
	ErrBuildID = errors.New("the links are of different builds")
	// ErrInspection: an inspection failed, or was not run.
	ErrInspection = errors.New("inspection")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", link.ErrMalformed, fmt.Errorf(format, args...))
}
