package story

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/swtpmtest"
)

// Pages of the documentation are run as they stand. What is to be done with a
// fenced block says an HTML comment above it.

// Block is a fenced block of a page. The comment "<!-- terminal: NAME -->" names
// the terminal that it goes into, "<!-- file: NAME -->" the file that it is.
type Block struct {
	Lang, Terminal, File, Text string
}

// Blocks returns those of a page, in their order.
func Blocks(t *testing.T, page string) []Block {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var out []Block
	re := regexp.MustCompile("(?s)(?:<!-- (terminal|file): ([\\w.-]+) -->\n)?```(\\w+)\n(.*?)```")
	for _, m := range re.FindAllStringSubmatch(string(text), -1) {
		b := Block{Lang: m[3], Text: m[4]}
		switch m[1] {
		case "terminal":
			b.Terminal = m[2]
		case "file":
			b.File = m[2]
		}
		out = append(out, b)
	}
	return out
}

// Shell runs a page's text as a person would have it in a terminal.
type Shell struct {
	T    *testing.T
	Page string // for messages
	Dir  string // where the commands run; empty: the test's own
	Env  []string
	Edit *strings.Replacer

	stop map[string]func() // of what Serve has started, by name
}

// Run runs text to its end and returns what it printed.
func (s *Shell) Run(text string) string {
	s.T.Helper()
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", s.Edit.Replace(text))
	cmd.Env, cmd.Dir = s.Env, s.Dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.T.Fatalf("%s: %v\n%s\n--- printed\n%s", s.Page, err, text, out)
	}
	return string(out)
}

// Serve runs text until the test ends, or until it is called again with that name,
// and waits until ready says so of what it prints; with nil, until it prints
// "ready".
func (s *Shell) Serve(name, text string, ready func(printed string) bool) {
	s.T.Helper()
	if ready == nil {
		ready = func(printed string) bool { return strings.Contains(printed, "ready") }
	}
	if stop := s.stop[name]; stop != nil {
		stop()
	}
	log := filepath.Join(s.T.TempDir(), name+".log")
	file, err := os.Create(log)
	if err != nil {
		s.T.Fatal(err)
	}
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", s.Edit.Replace(text))
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = s.Env, s.Dir, file, file
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		s.T.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	swtpmtest.AtDeath(s.T, `kill -KILL -- "-$1"`, strconv.Itoa(cmd.Process.Pid))
	stop := sync.OnceFunc(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(StopTimeout):
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-done
		}
		file.Close()
	})
	if s.stop == nil {
		s.stop = map[string]func(){}
	}
	s.stop[name] = stop
	s.T.Cleanup(func() {
		stop()
		if s.T.Failed() {
			printed, _ := os.ReadFile(log)
			s.T.Logf("--- %s printed\n%s", name, tail(printed, 6000))
		}
	})
	printed := func() string { b, _ := os.ReadFile(log); return string(b) }
	ended := false
	came := Poll(StartTimeout, func() bool {
		select {
		case <-done:
			ended = true
		default:
		}
		return ended || ready(printed())
	})
	if !came || ended {
		s.T.Fatalf("%s: %s did not get ready\n%s\n--- printed\n%s", s.Page, name, text, printed())
	}
}
