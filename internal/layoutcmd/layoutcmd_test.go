package layoutcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
)

// call runs `rootlink layout args`.
func call(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	root := cli.Root("rootlink", "", "test")
	root.AddCommand(Command())
	var out, errOut bytes.Buffer
	code = cli.Main(context.Background(), root, append([]string{"layout"}, args...), &out, &errOut)
	return code, out.String(), errOut.String()
}

func written(t *testing.T, args ...string) (w wrote) {
	t.Helper()
	code, out, errOut := call(t, append([]string{"--output", "json"}, args...)...)
	if code != 0 {
		t.Fatalf("%v: exit %d: %s", args, code, errOut)
	}
	if err := json.Unmarshal([]byte(out), &w); err != nil {
		t.Fatalf("%v: %v in %s", args, err, out)
	}
	return w
}

// keyFile makes a key pair with OpenSSL, as people do.
func keyFile(t *testing.T, args ...string) (private, public string) {
	t.Helper()
	private, public = filepath.Join(t.TempDir(), "key.pem"), filepath.Join(t.TempDir(), "key.pub")
	for _, a := range [][]string{append(append([]string{"genpkey"}, args...), "-out", private), {"pkey", "-in", private, "-pubout", "-out", public}} {
		if out, err := exec.Command("openssl", a...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %v: %v\n%s", a, err, out)
		}
	}
	return private, public
}

// A change takes the signatures off, and whoever saw the old edition must not
// take the old one for the new one.
func TestEachEditionHasItsOwnSerial(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hello.layout")
	key, _ := keyFile(t, "-algorithm", "ed25519")
	step := func(name string) []string {
		return []string{"add-step", file, "--name", name, "--identity", "spiffe://example.org/" + name, "--standalone", "--expect-products", "CREATE *", "--", "make"}
	}
	for _, e := range []struct {
		args   []string
		serial uint64
		signed int
	}{
		{[]string{"new", "--name", "hello", "--out", file}, 1, 0},
		{step("build"), 1, 0},
		{[]string{"sign", file, "--key", key}, 1, 1},
		{[]string{"sign", file, "--key", key, "--expires", "30d"}, 2, 1},
		{step("test"), 3, 0},
		{[]string{"sign", file, "--key", key}, 3, 1},
	} {
		if w := written(t, e.args...); w.Serial != e.serial || len(w.SignedBy) != e.signed || w.Out != file || w.Name != "hello" {
			t.Errorf("%v: %+v", e.args, w)
		}
	}
}

func TestRefusesWhatCouldNotBeMeant(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "hello.layout")
	p384, p384Public := keyFile(t, "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384")
	private, _ := keyFile(t, "-algorithm", "ed25519")
	written(t, "new", "--name", "hello", "--out", file)
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(dir, "tools.txt")
	if err := os.WriteFile(list, []byte("# nothing\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	add := func(args ...string) []string {
		return append([]string{"add-step", file, "--name", "build", "--identity", "spiffe://example.org/build"}, args...)
	}
	for name, args := range map[string][]string{
		"no key to sign with":          {"sign", file},
		"a layout without a step":      {"sign", file, "--key", private},
		"a key of another kind":        {"sign", file, "--key", p384},
		"a functionary of that kind":   add("--functionary-key", p384Public),
		"a private functionary key":    add("--functionary-key", private),
		"a rule that in-toto lacks":    add("--expect-products", "PERMIT *"),
		"an empty tool list":           add("--executables-from", list),
		"a tool that is not there":     add("--tool", filepath.Join(dir, "none")),
		"a command before the dashes":  add("make"),
		"a file that is there already": {"new", "--name", "hello", "--out", file},
		"a negative lifetime":          {"new", "--name", "other", "--expires", "-1h", "--out", filepath.Join(dir, "other")},
	} {
		if code, out, errOut := call(t, args...); code == 0 || !strings.Contains(errOut, "hint: ") {
			t.Errorf("%s: exit %d\n%s%s", name, code, out, errOut)
		}
	}
	if after, err := os.ReadFile(file); err != nil || !slices.Equal(before, after) {
		t.Errorf("a refusal changed the file: %v\n%s", err, after)
	}
}
