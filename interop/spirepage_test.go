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

// docs/spire.md is run as it stands, with stock SPIRE, but for the TPM and the
// ports.
func TestTheSPIREPage(t *testing.T) {
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
	var ports []string
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		ports = append(ports, port)
		l.Close()
	}
	s := &story.Shell{
		T: t, Page: "docs/spire.md", Dir: dir,
		Env:  append(os.Environ(), "HOME="+dir, "XDG_STATE_HOME="+filepath.Join(dir, "state"), "PATH="+programs.Bin+":"+os.Getenv("PATH")),
		Edit: strings.NewReplacer("TPM=/dev/tpmrm0", "TPM="+tpm.Device(), "8081", ports[0], "8082", ports[1]),
	}
	healthy := func(program, socket string) func(string) bool {
		return func(string) bool {
			return exec.CommandContext(t.Context(), program, "healthcheck", "-socketPath", filepath.Join(dir, socket)).Run() == nil
		}
	}
	preamble, ran := "", map[string]int{}
	for _, b := range story.Blocks(t, "../docs/spire.md") {
		switch {
		case b.File != "":
			if err := os.WriteFile(filepath.Join(dir, b.File), []byte(s.Edit.Replace(b.Text)), 0o600); err != nil {
				t.Fatal(err)
			}
		case b.Terminal == "tsa":
			s.Serve("tsa", preamble+b.Text, nil)
		case b.Terminal == "server":
			s.Serve("spire-server", preamble+b.Text, healthy("spire-server", "server.sock"))
		case b.Terminal == "agent":
			s.Serve("spire-agent", preamble+b.Text, healthy("spire-agent", "agent.sock"))
		case b.Terminal == "once":
			s.Run(preamble + b.Text)
			for line := range strings.Lines(b.Text) {
				if strings.HasPrefix(line, "export ") {
					preamble += line
				}
			}
		case b.Terminal != "":
			t.Fatalf("unknown terminal %q", b.Terminal)
		}
		ran[b.Terminal]++
	}
	for _, name := range []string{"tsa", "server", "agent"} {
		if ran[name] != 1 {
			t.Errorf("terminal %s has %d blocks", name, ran[name])
		}
	}
	if ran["once"] < 6 {
		t.Errorf("%d blocks to type", ran["once"])
	}
}
