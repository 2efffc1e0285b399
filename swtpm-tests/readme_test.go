package stories

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

// The README is run as it stands: the "By hand" blocks in their order, the
// transcript on its first screen against what the programs print.

// block is a fenced block of the README; terminal is what the HTML comment
// above it says: "server" and "agent" keep running, others end by themselves.
type block struct {
	lang, terminal, text string
}

func readmeBlocks(t *testing.T) []block {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []block
	re := regexp.MustCompile("(?s)(?:<!-- terminal: (\\w+) -->\n)?```(\\w+)\n(.*?)```")
	for _, m := range re.FindAllStringSubmatch(string(text), -1) {
		out = append(out, block{terminal: m[1], lang: m[2], text: m[3]})
	}
	return out
}

// shell runs README's text as a person would have it in a terminal.
type shell struct {
	t    *testing.T
	env  []string
	edit *strings.Replacer
}

func (s *shell) run(text string) string {
	s.t.Helper()
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", s.edit.Replace(text))
	cmd.Env = s.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("README: %v\n%s\n--- printed\n%s", err, text, out)
	}
	return string(out)
}

func (s *shell) serve(name, text string) {
	s.t.Helper()
	log := filepath.Join(s.t.TempDir(), name+".log")
	file, err := os.Create(log)
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", s.edit.Replace(text))
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env, file, file
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	swtpmtest.AtDeath(s.t, `kill -KILL -- "-$1"`, strconv.Itoa(cmd.Process.Pid))
	s.t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(story.StopTimeout):
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-done
		}
		file.Close()
	})
	ready := story.Poll(story.StartTimeout, func() bool {
		text, _ := os.ReadFile(log)
		select {
		case <-done:
			return true
		default:
		}
		return strings.Contains(string(text), "ready")
	})
	printed, _ := os.ReadFile(log)
	if !ready || !strings.Contains(string(printed), "ready") {
		s.t.Fatalf("README: %s did not get ready\n%s\n--- printed\n%s", name, text, printed)
	}
}

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
	s := &shell{t: t, env: env, edit: strings.NewReplacer(
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
	for _, b := range readmeBlocks(t) {
		switch {
		case b.lang == "console":
			transcript = b.text
		case b.terminal == "":
			continue
		case b.terminal == "server" || b.terminal == "agent":
			s.serve(b.terminal, preamble+b.text)
			ran++
		case b.terminal == "once":
			s.run(preamble + b.text)
			ran++
			for line := range strings.Lines(b.text) {
				if strings.HasPrefix(line, "export ") || strings.HasPrefix(line, "cd ") {
					preamble += line
				}
			}
		default:
			t.Fatalf("README: unknown terminal %q", b.terminal)
		}
	}
	if ran < 5 || transcript == "" {
		t.Fatalf("README has %d runnable blocks and a transcript of %d bytes", ran, len(transcript))
	}
	checkTranscript(s, preamble, transcript)
}

// checkTranscript runs each "$ " line and compares what it prints with the
// lines below it, where … stands for anything.
func checkTranscript(s *shell, preamble, transcript string) {
	s.t.Helper()
	for i, part := range strings.Split("\n"+transcript, "\n$ ") {
		if i == 0 {
			continue
		}
		command, want, _ := strings.Cut(part, "\n")
		got := s.run(preamble + command)
		var pattern []string
		for line := range strings.Lines(strings.TrimRight(want, "\n") + "\n") {
			pattern = append(pattern, strings.ReplaceAll(regexp.QuoteMeta(strings.TrimRight(line, "\n")), "…", ".*"))
		}
		re := regexp.MustCompile(fmt.Sprintf("(?s)^%s\n", strings.Join(pattern, "\n")))
		if !re.MatchString(got) {
			s.t.Errorf("README's transcript of %q\n--- says\n%s\n--- but it prints\n%s", command, want, got)
		}
	}
}
