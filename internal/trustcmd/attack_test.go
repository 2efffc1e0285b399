package trustcmd

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

// Anybody can sign anything and send it as a revocation file to be looked at.
func TestRefusesToPrintWhatATerminalObeys(t *testing.T) {
	dir := t.TempDir()
	show := func(document string) (int, string) {
		t.Helper()
		raw, err := envelope.Sign(link.RevocationsPayloadType, []byte(document), forge.P256(t))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "revocations.json")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		root := cli.Root("rootlink", "", "test")
		root.AddCommand(Command())
		var out, errOut bytes.Buffer
		code := cli.Main(context.Background(), root, []string{"trust", "show", path}, &out, &errOut)
		return code, out.String() + errOut.String()
	}
	if code, out := show("\x1b]0;owned\a\x1b[2J"); code != cli.ExitCrypto || strings.Contains(out, "\x1b") {
		t.Errorf("exit %d: %q", code, out)
	}
	// The control sequence introducer of the C1 set, and text that runs backwards.
	const hidden = "{\"reason\": \"\u009b2J \u202etxt.exe \U000e0041\"}"
	if code, out := show(hidden); code != 0 || !strings.HasPrefix(out, `{"reason": "\u009b2J \u202etxt.exe \udb40\udc41"}`) {
		t.Errorf("exit %d: %q", code, out)
	}
	const plain = "{\n\t\"reason\": \"größer\"\n}\n"
	if code, out := show(plain); code != 0 || !strings.HasPrefix(out, plain) {
		t.Errorf("exit %d: %q", code, out)
	}
}
