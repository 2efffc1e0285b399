package story

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rootlink/rootlink/internal/swtpmtest"
)

// exits CODE COMMAND…: runs it and wants exactly that exit code.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
	if crashed(ts.ReadFile("stderr")) {
		ts.Fatalf("it crashed")
	}
}

// refused CODE COMMAND…: exits with CODE, says what happened and what to do.
func cmdRefused(ts *testscript.TestScript, neg bool, args []string) {
	cmdExits(ts, neg, args)
	words(ts, args[1], ts.ReadFile("stderr"))
}

// ends NAME CODE REGEXP: the daemon ends by itself with that exit code, says
// what happened, which matches REGEXP, and what to do.
func (w *World) cmdEnds(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: ends NAME CODE REGEXP")
	}
	d := w.daemons[args[0]]
	if d == nil {
		ts.Fatalf("no daemon %q", args[0])
	}
	d.wait(ts)
	text, err := os.ReadFile(d.log)
	ts.Check(err)
	log := string(tail(text, 6000))
	if got := strconv.Itoa(d.cmd.ProcessState.ExitCode()); got != args[1] {
		ts.Fatalf("%s ended with exit code %s, want %s:\n%s", args[0], got, args[1], log)
	}
	if !regexp.MustCompile("(?m)" + args[2]).MatchString(log) {
		ts.Fatalf("%s says nothing that matches %q:\n%s", args[0], args[2], log)
	}
	words(ts, args[0], log)
}

func words(ts *testscript.TestScript, who, text string) {
	if crashed(text) || !regexp.MustCompile(`(?m)^error: \S`).MatchString(text) || !regexp.MustCompile(`(?m)^hint: \S`).MatchString(text) {
		ts.Fatalf("%s does not say error: and hint: at the start of a line:\n%s", who, text)
	}
}

func crashed(text string) bool {
	return strings.Contains(text, "panic:") || strings.Contains(text, "goroutine ")
}

// holds DIR [NAME…]: the directory holds these names and no other: nothing
// half-written was left in it.
func cmdHolds(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: holds DIR [NAME…]")
	}
	entries, err := os.ReadDir(ts.MkAbs(args[0]))
	ts.Check(err)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	want := slices.Sorted(slices.Values(args[1:]))
	if !slices.Equal(got, want) {
		ts.Fatalf("%s holds %q, want %q", args[0], got, want)
	}
}

// own UID FILE…: gives files to another user, as root.
func cmdOwn(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: own UID FILE…")
	}
	uid, err := strconv.Atoi(args[0])
	ts.Check(err)
	for _, f := range args[1:] {
		ts.Check(os.Lchown(ts.MkAbs(f), uid, uid))
	}
}

// smallfs DIR SIZE: mounts a file system of that size at DIR, as root; with
// SIZE full it is filled to the last byte instead. It goes with the story.
func cmdSmallFS(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: smallfs DIR SIZE|full|free")
	}
	dir := ts.MkAbs(args[0])
	switch args[1] {
	case "full":
		f, err := os.Create(dir + "/.ballast")
		ts.Check(err)
		defer f.Close()
		for block := make([]byte, 4096); err == nil; {
			_, err = f.Write(block)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			ts.Fatalf("filling %s: %v", dir, err)
		}
	case "free":
		ts.Check(os.Remove(dir + "/.ballast"))
	default:
		ts.Check(os.MkdirAll(dir, 0o700))
		ts.Check(syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+args[1]))
		ts.Defer(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	}
}

// public VAR [PROGRAM…]: makes a directory that every user may enter, with
// copies of these programs, and puts its path into $VAR.
func (w *World) cmdPublic(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: public VAR [PROGRAM…]")
	}
	dir, err := os.MkdirTemp("", "rl")
	ts.Check(err)
	ts.Defer(func() { _ = os.RemoveAll(dir) })
	ts.Check(os.Chmod(dir, 0o755))
	for _, name := range args[1:] {
		from := w.Bin
		if !strings.HasPrefix(name, "rootlink") {
			from = w.Helpers
		}
		b, err := os.ReadFile(filepath.Join(from, name))
		ts.Check(err)
		ts.Check(os.WriteFile(filepath.Join(dir, name), b, 0o755))
	}
	ts.Setenv(args[0], dir)
}

// maker other|own: the server started next trusts another maker's roots than
// those of the story's TPMs, or theirs again.
func (w *World) cmdMaker(ts *testscript.TestScript, neg bool, args []string) {
	switch {
	case !neg && len(args) == 1 && args[0] == "other":
		other := ts.MkAbs("other-maker.pem")
		ts.Check(os.WriteFile(other, swtpmtest.NewMaker(w.t, "Another TPM Maker").RootPEM(), 0o600))
		ts.Setenv("MAKER", other)
	case !neg && len(args) == 1 && args[0] == "own":
		ts.Setenv("MAKER", ts.MkAbs("maker.pem"))
	default:
		ts.Fatalf("usage: maker other|own")
	}
}

// splice ONE TWO OUT: ONE's signed statement with TWO's certificate, and so
// with the evidence of TWO.
func cmdSplice(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: splice ONE TWO OUT")
	}
	var one, two map[string]json.RawMessage
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &one))
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[1])), &two))
	one["verificationMaterial"] = two["verificationMaterial"]
	out, err := json.Marshal(one)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), out, 0o600))
}

// json COMMAND…: succeeds, and its stdout is one JSON value and nothing else.
func cmdJSON(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: json COMMAND…")
	}
	ts.Check(ts.Exec(args[0], append(args[1:len(args):len(args)], "--output", "json")...))
	if !json.Valid([]byte(ts.ReadFile("stdout"))) {
		ts.Fatalf("stdout of %s is not JSON", strings.Join(args, " "))
	}
}

// post STATUS URL CONTENT-TYPE IN OUT: posts the file IN, wants that status and
// writes the body to OUT.
func cmdPost(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 5 {
		ts.Fatalf("usage: post STATUS URL CONTENT-TYPE IN OUT")
	}
	resp, err := http.Post(args[1], args[2], strings.NewReader(ts.ReadFile(args[3])))
	ts.Check(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[4]), body, 0o600))
	if strconv.Itoa(resp.StatusCode) != args[0] {
		ts.Fatalf("status %s, want %s", resp.Status, args[0])
	}
}
