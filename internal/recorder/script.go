package recorder

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

// maxShebang is what the kernel reads of a script's first line, in bytes
// (BINPRM_BUF_SIZE).
const maxShebang = 256

// firstLine is the interpreter and its argument, of a file that begins with #!.
func firstLine(head []byte) string {
	line, _, _ := bytes.Cut(head, []byte("\n"))
	return strings.TrimSpace(strings.TrimPrefix(string(line), "#!"))
}

// scriptNotes says what an identity for a script covers: its interpreter, so
// any other script too. env is that of the tool.
func scriptNotes(e *Exec, env []string) []string {
	if e.Script == nil {
		return nil
	}
	notes := []string{fmt.Sprintf("%s is a script: its interpreter %s is the tool, so the identity covers every script that this interpreter runs; the link records which one it was",
		e.Script.Path, e.Path)}
	name, ok := envProgram(e.Script.line)
	if !ok {
		return notes
	}
	first := "it begins with env, which goes on to run another program; the identity needs a selector for each"
	path, sum, err := expectProgram(name, env)
	if err != nil {
		return append(notes, fmt.Sprintf("%s, and which one cannot be said beforehand (%s): run the step, and take the line from its hint", first, err))
	}
	return append(notes, fmt.Sprintf("%s: add --selector %s%s (expected, not measured: %s, the %s in PATH now)",
		first, attest.SelectorTool, hex.EncodeToString(sum[:]), path, name))
}

// envProgram returns what the env of a script's first line will run, "" when
// that takes more than a glance to say. ok is false when the line is not env's.
func envProgram(line string) (name string, ok bool) {
	interpreter, arg, _ := strings.Cut(line, " ")
	if filepath.Base(interpreter) != "env" {
		return "", false
	}
	// The kernel hands on all of it as one argument; env splits it on request.
	arg = strings.TrimSpace(arg)
	split := false
	for _, flag := range []string{"--split-string=", "--split-string ", "-S"} {
		if rest, found := strings.CutPrefix(arg, flag); found {
			arg, split = strings.TrimSpace(rest), true
			break
		}
	}
	fields := strings.Fields(arg)
	if len(fields) == 0 || !split && len(fields) > 1 || strings.ContainsAny(arg, `"'\$`) {
		return "", true
	}
	// Options and variables can change where it looks.
	if strings.HasPrefix(fields[0], "-") || strings.Contains(fields[0], "=") {
		return "", true
	}
	return fields[0], true
}

// expectProgram finds and hashes what env would run.
func expectProgram(name string, env []string) (path string, sum [32]byte, err error) {
	if name == "" {
		return "", sum, fmt.Errorf("its first line does more than name it")
	}
	if path, err = Lookup(name, env); err != nil {
		return "", sum, err
	}
	f, err := os.Open(path)
	if err != nil {
		return "", sum, err
	}
	defer f.Close()
	var magic [2]byte
	if _, err := f.ReadAt(magic[:], 0); err == nil && string(magic[:]) == "#!" {
		return "", sum, fmt.Errorf("%s is a script itself", path)
	}
	sum, err = files.SHA256(path)
	return path, sum, err
}

// withScriptNotes adds to a hint that proposes an entry what that entry covers.
func withScriptNotes(err error, e *Exec, env []string) error {
	hint := cli.HintOf(err)
	if e.Script == nil || !strings.Contains(hint, "entry create") {
		return err
	}
	return cli.Hint(err, strings.Join(append([]string{hint}, scriptNotes(e, env)...), "\nnote: "))
}
