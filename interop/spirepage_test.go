package interop

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

// The pages about SPIRE are run as they stand, with stock SPIRE, but for the TPM
// and the ports.
func TestTheSPIREPage(t *testing.T) {
	runPage(t, "../docs/spire.md", map[string]int{"tsa": 1, "server": 1, "agent": 1, "once": 6})
}

func TestTheMigrationPage(t *testing.T) {
	runPage(t, "../docs/migrating-from-spire.md", map[string]int{"server": 1, "agent": 4, "rootlink-server": 1, "once": 10})
}

// runPage runs a page's blocks in their order; least is how many of each terminal
// it has to have.
func runPage(t *testing.T, page string, least map[string]int) {
	t.Helper()
	t.Parallel()
	dir, err := os.MkdirTemp("", "rl") // Unix socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	swtpmtest.AtDeath(t, `rm -rf "$1"`, dir)
	t.Cleanup(func() { os.RemoveAll(dir) })
	maker := swtpmtest.NewMaker(t, "Page TPM Maker")
	tpm := swtpmtest.Start(t, swtpmtest.WithMaker(maker), swtpmtest.WithEK(swtpmtest.ECCP256))
	if err := os.WriteFile(filepath.Join(dir, "maker.pem"), append(maker.RootPEM(), maker.IntermediatePEM()...), 0o600); err != nil {
		t.Fatal(err)
	}
	var listeners []net.Listener
	edits := []string{"TPM=/dev/tpmrm0", "TPM=" + tpm.Device()}
	for _, port := range []string{"8081", "8082", "8083"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l) // all open at once, so that they differ
		_, free, _ := net.SplitHostPort(l.Addr().String())
		edits = append(edits, port, free)
	}
	for _, l := range listeners {
		l.Close()
	}
	s := &story.Shell{
		T: t, Page: filepath.Base(page), Dir: dir,
		Env:  append(os.Environ(), "HOME="+dir, "TMPDIR="+dir, "XDG_STATE_HOME="+filepath.Join(dir, "state"), "PATH="+programs.Bin+":"+os.Getenv("PATH")),
		Edit: strings.NewReplacer(edits...),
	}
	healthy := func(program, socket string) func(string) bool {
		return func(string) bool {
			return exec.CommandContext(t.Context(), program, "healthcheck", "-socketPath", filepath.Join(dir, socket)).Run() == nil
		}
	}
	preamble, ran := "", map[string]int{}
	for _, b := range story.Blocks(t, page) {
		switch b.Terminal {
		case "":
			if b.File == "" {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, b.File), []byte(s.Edit.Replace(b.Text)), 0o600); err != nil {
				t.Fatal(err)
			}
		case "tsa", "rootlink-server":
			s.Serve(b.Terminal, preamble+b.Text, nil)
		case "server":
			s.Serve("spire-server", preamble+b.Text, healthy("spire-server", "server.sock"))
		case "agent":
			s.Serve("agent", preamble+b.Text, healthy("spire-agent", "agent.sock"))
		case "once":
			s.Run(preamble + b.Text)
			for line := range strings.Lines(b.Text) {
				if strings.HasPrefix(line, "export ") {
					preamble += line
				}
			}
		default:
			t.Fatalf("unknown terminal %q", b.Terminal)
		}
		ran[b.Terminal]++
	}
	for name, n := range least {
		if ran[name] < n {
			t.Errorf("terminal %s has %d blocks, not %d", name, ran[name], n)
		}
	}
}
