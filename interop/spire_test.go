package interop

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"os"
	"os/exec"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

// spireCommands are what the scripts with stock SPIRE need beside the stories'
// own commands: its configuration files hold ports, digests and directories that
// are known only when a script runs.
func spireCommands() map[string]story.Command {
	return map[string]story.Command{
		"port":   cmdPort,
		"digest": cmdDigest,
		"expand": cmdExpand,
	}
}

// port VAR…: puts a free TCP port of 127.0.0.1 into each.
func cmdPort(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: port VAR…")
	}
	for _, name := range args {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		ts.Check(err)
		defer l.Close()
		_, port, err := net.SplitHostPort(l.Addr().String())
		ts.Check(err)
		ts.Setenv(name, port)
	}
}

// digest VAR PROGRAM: puts the absolute path of PROGRAM into $VAR and the
// SHA-256 of its file, as plugin_checksum wants it, into $VAR_SHA256.
func cmdDigest(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: digest VAR PROGRAM")
	}
	path := args[1]
	if !strings.Contains(path, "/") {
		for dir := range strings.SplitSeq(ts.Getenv("PATH"), ":") {
			if found, err := exec.LookPath(dir + "/" + args[1]); err == nil {
				path = found
				break
			}
		}
	}
	b, err := os.ReadFile(ts.MkAbs(path))
	ts.Check(err)
	sum := sha256.Sum256(b)
	ts.Setenv(args[0], ts.MkAbs(path))
	ts.Setenv(args[0]+"_SHA256", hex.EncodeToString(sum[:]))
}

// expand FILE…: replaces ${NAME} in them by the script's variables. A name that
// is not set is an error: SPIRE would be told nothing there.
func cmdExpand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: expand FILE…")
	}
	for _, file := range args {
		text := os.Expand(ts.ReadFile(file), func(name string) string {
			v := ts.Getenv(name)
			if v == "" {
				ts.Fatalf("%s: ${%s} is not set", file, name)
			}
			return v
		})
		ts.Check(os.WriteFile(ts.MkAbs(file), []byte(text), 0o600))
	}
}
