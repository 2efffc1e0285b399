//go:build bench

// Package fleet measures servers under many agents: ours and, in the same run
// and by the same client, stock SPIRE's with our plugin. The agents are
// simulated; their TPMs are forged, which is why this is test code. It judges
// nothing but prints lines of the table that scripts/bench begins.
package fleet

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/bench/figures"
)

var (
	only   = flag.String("only", "", "measure only what matches this regular expression")
	runs   = flag.Int("runs", 3, "how often the slow figures are repeated")
	agents = flag.Int("agents", 10_000, "simulated agents that sync")
	storm  = flag.Int("storm", 500, "simulated agents that attest again at once")
	_      = flag.String("dir", "", "not used here")
	_      = flag.String("profile", "", "not used here")
	_      = flag.Bool("v", false, "not used here")
)

// bin is the directory of the programs under test, spire that of the stock ones.
var bin, spire string

func TestMain(m *testing.M) {
	flag.Parse()
	if bin = os.Getenv("ROOTLINK_BIN"); bin == "" {
		fmt.Fprintln(os.Stderr, "fleet: ROOTLINK_BIN does not name the directory of the programs; start this with `make bench`")
		os.Exit(1)
	}
	for dir := range strings.SplitSeq(os.Getenv("ROOTLINK_PEERS"), ":") {
		if _, err := os.Stat(filepath.Join(dir, "spire-server")); err == nil {
			spire = dir
		}
	}
	os.Exit(m.Run())
}

// groups are what is measured, in the order of the table.
func TestFigures(t *testing.T) {
	match, err := regexp.Compile(*only)
	if err != nil {
		t.Fatal(err)
	}
	out := &figures.Table{W: os.Stdout}
	for _, g := range []struct {
		name  string
		stock bool // needs stock SPIRE
		do    func(*testing.T, *figures.Table)
	}{
		{"mint", true, mint},
		{"batch", true, batch},
		{"storm", true, storms},
		{"entry-on-stock", true, entryOnStock},
		{"fleet", false, fleet},
	} {
		if !match.MatchString(g.name) {
			continue
		}
		if g.stock && spire == "" {
			out.Line(g.name, "not measured", "", "stock SPIRE is not built; scripts/interop builds it, for which it needs the network once")
			continue
		}
		if !t.Run(g.name, func(t *testing.T) { g.do(t, out) }) {
			return
		}
	}
}
