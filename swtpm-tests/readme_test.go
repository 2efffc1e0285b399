package stories

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

// The README is run as it stands: the "By hand" blocks in their order, the
// transcript on its first screen against what the programs print.

func TestREADME(t *testing.T) {
	// Unix socket paths are short, so the test's home is too.
	home, err := os.MkdirTemp("", "rl")
	if err != nil {
		t.Fatal(err)
	}
	repo, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()

	var env []string
	for _, name := range []string{"GOCACHE", "GOROOT", "GOPATH", "GOMODCACHE"} {
		out, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		env = append(env, name+"="+strings.TrimSpace(string(out)))
	}
	env = append(env, "HOME="+home, "PATH="+programs.Bin+":"+os.Getenv("PATH"), "XDG_STATE_HOME="+filepath.Join(home, "state"), "GOFLAGS=-buildvcs=false")
	s := &story.Shell{T: t, Page: "README", Env: env, Edit: strings.NewReplacer(
		"127.0.0.1:8081", address,
		"rootlink-server run", "rootlink-server run --http-listen 127.0.0.1:0 --listen "+address,
		"ROOTLINK=$PWD", "ROOTLINK="+repo,
	)}
	swtpmtest.AtDeath(t, `"$1/scripts/software-tpm" stop "$2/rootlink/tpm"; rm -rf "$2"`, repo, home)
	t.Cleanup(func() {
		_ = exec.Command("../scripts/software-tpm", "stop", filepath.Join(home, "rootlink", "tpm")).Run()
		os.RemoveAll(home)
	})

	var preamble string // what a person's shell remembers from block to block
	var transcript string
	ran := 0
	for _, b := range story.Blocks(t, "../README.md") {
		switch {
		case b.Lang == "console":
			transcript = b.Text
		case b.Terminal == "":
			continue
		case b.Terminal == "server" || b.Terminal == "agent":
			s.Serve(b.Terminal, preamble+b.Text, nil)
			ran++
		case b.Terminal == "once":
			s.Run(preamble + b.Text)
			ran++
			for line := range strings.Lines(b.Text) {
				if strings.HasPrefix(line, "export ") || strings.HasPrefix(line, "cd ") {
					preamble += line
				}
			}
		default:
			t.Fatalf("README: unknown terminal %q", b.Terminal)
		}
	}
	if ran < 5 || transcript == "" {
		t.Fatalf("README has %d runnable blocks and a transcript of %d bytes", ran, len(transcript))
	}
	checkTranscript(s, preamble, transcript)
}

// checkTranscript runs each "$ " line and compares what it prints with the
// lines below it, where … stands for anything.
func checkTranscript(s *story.Shell, preamble, transcript string) {
	s.T.Helper()
	for i, part := range strings.Split("\n"+transcript, "\n$ ") {
		if i == 0 {
			continue
		}
		command, want, _ := strings.Cut(part, "\n")
		got := s.Run(preamble + command)
		var pattern []string
		for line := range strings.Lines(strings.TrimRight(want, "\n") + "\n") {
			pattern = append(pattern, strings.ReplaceAll(regexp.QuoteMeta(strings.TrimRight(line, "\n")), "…", ".*"))
		}
		re := regexp.MustCompile(fmt.Sprintf("(?s)^%s\n", strings.Join(pattern, "\n")))
		if !re.MatchString(got) {
			s.T.Errorf("README's transcript of %q\n--- says\n%s\n--- but it prints\n%s", command, want, got)
		}
	}
}
