package interop

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

// spireServers runs stock spire-server's command line against two servers, whose
// admin sockets are $STOCK and $OURS, and holds what it says to one against what
// it says to the other.
type spireServers struct {
	mu    sync.Mutex
	sides map[*testscript.TestScript]*[2]spireSide // guarded by mu: scripts run side by side
}

// spireSide remembers what a server made up, by the order in which it was seen:
// <ID1> in a command is the first entry ID of each side's own, <AUTHORITY1> the
// first authority.
type spireSide struct {
	ids, authorities []string
}

func spireCLICommands() map[string]story.Command {
	s := &spireServers{sides: make(map[*testscript.TestScript]*[2]spireSide)}
	return map[string]story.Command{"same": s.cmdSame, "differs": s.cmdDiffers}
}

// same [<FILE] ARGS…: both servers answer the command alike, and it succeeds
// ("! same": fails). What is compared: the exit code and all output, less random
// IDs, serial numbers, times, certificates, and the words after a status code.
func (s *spireServers) cmdSame(ts *testscript.TestScript, neg bool, args []string) {
	stock, ours := s.both(ts, args)
	if stock != ours {
		ts.Fatalf("stock says:\n%s\nrootlink-server says:\n%s", stock, ours)
	}
	if ok := strings.HasPrefix(stock, "exit 0\n"); ok == neg {
		ts.Fatalf("both say:\n%s", stock)
	}
}

// differs STOCK OURS [<FILE] ARGS…: the answers are not alike, stock's matches
// the first regular expression and ours the second. Why is in docs/server-api.md.
func (s *spireServers) cmdDiffers(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: differs STOCK OURS [<FILE] ARGS…")
	}
	stock, ours := s.both(ts, args[2:])
	if stock == ours {
		ts.Fatalf("both say:\n%s", stock)
	}
	for i, text := range []string{stock, ours} {
		if !regexp.MustCompile("(?s)" + args[i]).MatchString(text) {
			ts.Fatalf("%q does not match:\n%s", args[i], text)
		}
	}
}

func (s *spireServers) both(ts *testscript.TestScript, args []string) (stock, ours string) {
	s.mu.Lock()
	sides := s.sides[ts]
	if sides == nil {
		sides = new([2]spireSide)
		s.sides[ts] = sides
	}
	s.mu.Unlock()
	var stdin []byte
	if len(args) > 0 && strings.HasPrefix(args[0], "<") {
		stdin = []byte(ts.ReadFile(args[0][1:]))
		args = args[1:]
	}
	out := [2]string{}
	for i, socket := range []string{ts.Getenv("STOCK"), ts.Getenv("OURS")} {
		side := &sides[i]
		var argv []string
		for _, a := range args {
			argv = append(argv, side.own(ts, a))
		}
		out[i] = side.run(ts, socket, argv, side.own(ts, string(stdin)))
	}
	return out[0], out[1]
}

// own replaces <ID1> and <AUTHORITY1> by this side's first.
func (s *spireSide) own(ts *testscript.TestScript, text string) string {
	return regexp.MustCompile(`<(ID|AUTHORITY)(\d+)>`).ReplaceAllStringFunc(text, func(name string) string {
		list, digits := s.ids, strings.TrimPrefix(name, "<ID")
		if strings.HasPrefix(name, "<A") {
			list, digits = s.authorities, strings.TrimPrefix(name, "<AUTHORITY")
		}
		n, err := strconv.Atoi(strings.TrimSuffix(digits, ">"))
		if err != nil || n < 1 || n > len(list) {
			ts.Fatalf("no %s was seen yet", name)
		}
		return list[n-1]
	})
}

// numbered replaces each of what re finds by a name with its number in list.
func numbered(re *regexp.Regexp, text, name string, list *[]string) string {
	return re.ReplaceAllStringFunc(text, func(found string) string {
		i := slices.Index(*list, found)
		if i < 0 {
			i = len(*list)
			*list = append(*list, found)
		}
		return fmt.Sprintf("<%s%d>", name, i+1)
	})
}

func (s *spireSide) run(ts *testscript.TestScript, socket string, argv []string, stdin string) string {
	path, err := exec.LookPath("spire-server")
	ts.Check(err)
	// The words come first, and flags may not follow others' arguments.
	n := 0
	for n < len(argv) && !strings.HasPrefix(argv[n], "-") {
		n++
	}
	full := append(append(append([]string{}, argv[:n]...), "-socketPath", socket), argv[n:]...)
	cmd := exec.Command(path, full...)
	cmd.Dir = ts.Getenv("WORK")
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = append(os.Environ(), "TZ=UTC")
	err = cmd.Run()
	if cmd.ProcessState == nil {
		ts.Fatalf("%v", err)
	}
	return fmt.Sprintf("exit %d\n-- stdout --\n%s-- stderr --\n%s", cmd.ProcessState.ExitCode(), s.normal(stdout.String()), s.normal(stderr.String()))
}

var (
	uuid = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	// An X.509 authority is named by its subject key ID, a JWT one by a random
	// text; a node has 64 digits.
	authority = regexp.MustCompile(`\b[0-9a-f]{40}\b|\b[A-Za-z0-9_-]{32}\b`)
	normal    = []struct {
		re *regexp.Regexp
		by string
	}{
		{regexp.MustCompile(`(?s)-----BEGIN ([A-Z ]+)-----.*?-----END [A-Z ]+-----`), "<PEM $1>"},
		{regexp.MustCompile(`desc = [^\n]*`), "desc = <words>"},
		{regexp.MustCompile(`msg: "[^\n]*"\)`), "msg: <words>)"},
		{regexp.MustCompile(`("code":[1-9]\d*,"message":)"(\\.|[^"\\])*"`), `$1<words>`},
		{regexp.MustCompile(`[Ss]erial [Nn]umber( *): \d+`), "Serial number$1: <serial>"},
		{regexp.MustCompile(`("x509svid_serial_number":)"\d+"`), `$1"<serial>"`},
		{regexp.MustCompile(`("(?:created_at|x509svid_expires_at|expires_at|sequence_number)":)"[1-9]\d*"`), `$1"<time>"`},
		{regexp.MustCompile(`20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\dZ?( [+-]\d{4} [A-Z]+)?`), "<time>"},
		{regexp.MustCompile(`("asn1":)"[^"]*"`), `$1"<der>"`},
		{regexp.MustCompile(`("public_key":)"[^"]*"`), `$1"<der>"`},
		{regexp.MustCompile(`("(?:x|y|n|kid)": )"[^"]*"`), `$1"<key>"`},
		{regexp.MustCompile(`("private_key":)"[^"]*"`), `$1"<key>"`},
		{regexp.MustCompile(`"MII[^"]*"`), `"<der>"`},
		{regexp.MustCompile(`("spiffe_sequence": )\d+`), `$1<n>`},
	}
)

func (s *spireSide) normal(text string) string {
	for _, n := range normal {
		text = n.re.ReplaceAllString(text, n.by)
	}
	// Last: keys and certificates may hold what looks like one.
	text = numbered(uuid, text, "ID", &s.ids)
	return numbered(authority, text, "AUTHORITY", &s.authorities)
}
