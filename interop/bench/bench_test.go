//go:build bench

// Package bench measures rootlink beside its peers, each as the program that
// people start, on the same files in turn. It judges nothing but prints a table;
// scripts/interop-bench runs it.
package bench

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

var programs story.Programs

func TestMain(m *testing.M) {
	story.Main(m, "..", map[string]string{"witness": "./witness"}, func(p story.Programs) { programs = p })
}

func TestPeers(t *testing.T) {
	for _, script := range []string{"record", "layout"} { // one after the other
		m := &meter{}
		t.Run(script, func(t *testing.T) {
			programs.Run(t, "testdata/"+script+".txt", map[string]story.Command{
				"tree": cmdTree, "touched": cmdTouched, "measure": m.cmdMeasure, "alternate": m.cmdAlternate,
			})
		})
		m.print()
	}
}

// tree DIR FILES SIZE BIG: so many files of SIZE bytes and one of BIG bytes.
func cmdTree(ts *testscript.TestScript, neg bool, args []string) {
	dir := ts.MkAbs(args[0])
	var n [3]int
	for i := range n {
		var err error
		n[i], err = strconv.Atoi(args[i+1])
		ts.Check(err)
	}
	r := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, 1<<20)
	for i := range n[0] {
		sub := filepath.Join(dir, fmt.Sprintf("%02d", i%100))
		if i < 100 {
			ts.Check(os.MkdirAll(sub, 0o700))
		}
		r.Read(buf[:n[1]])
		ts.Check(os.WriteFile(filepath.Join(sub, strconv.Itoa(i)), buf[:n[1]], 0o600))
	}
	if n[2] == 0 {
		return
	}
	f, err := os.Create(filepath.Join(dir, "big"))
	ts.Check(err)
	defer f.Close()
	for range n[2] / len(buf) {
		r.Read(buf)
		_, err := f.Write(buf)
		ts.Check(err)
	}
	ts.Check(f.Sync())
}

// touched DIR: gives every file a new ctime, so that nobody's memory of it holds.
func cmdTouched(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(touch(ts.MkAbs(args[0])))
}

func touch(dir string) error {
	return filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return os.Chmod(path, 0o600)
	})
}

// settle waits until every file is older than what a recorder takes for new.
func settle(dir string) error {
	var newest time.Time
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		c := info.Sys().(*syscall.Stat_t).Ctim
		if t := time.Unix(c.Sec, c.Nsec); t.After(newest) {
			newest = t
		}
		return nil
	})
	time.Sleep(time.Until(newest.Add(3 * time.Second)))
	return err
}

type runner struct {
	name, dir     string
	touch, settle string // directories
	argv          []string
	took          []time.Duration
	peak          int64 // bytes
}

// meter measures programs in turn, so that a busy minute hits all of them.
type meter struct{ runners []*runner }

// measure NAME [touch=DIR|settle=DIR] COMMAND…: to be measured in this directory.
func (m *meter) cmdMeasure(ts *testscript.TestScript, neg bool, args []string) {
	r := &runner{name: args[0], dir: ts.MkAbs("."), argv: args[1:]}
	if dir, ok := strings.CutPrefix(r.argv[0], "touch="); ok {
		r.touch, r.argv = ts.MkAbs(dir), r.argv[1:]
	}
	if dir, ok := strings.CutPrefix(r.argv[0], "settle="); ok {
		r.settle, r.argv = ts.MkAbs(dir), r.argv[1:]
	}
	m.runners = append(m.runners, r)
}

// alternate RUNS: runs all that is to be measured, so often, in turn.
func (m *meter) cmdAlternate(ts *testscript.TestScript, neg bool, args []string) {
	runs, err := strconv.Atoi(args[0])
	ts.Check(err)
	for range runs {
		for _, r := range m.runners {
			if r.touch != "" {
				ts.Check(touch(r.touch))
			}
			if r.settle != "" {
				ts.Check(settle(r.settle))
			}
			path, err := lookPath(ts.Getenv("PATH"), r.argv[0])
			ts.Check(err)
			cmd := exec.Command(path, r.argv[1:]...)
			cmd.Dir = r.dir
			for _, name := range []string{"PATH", "SPIFFE_ENDPOINT_SOCKET", "XDG_STATE_HOME", "HOME"} {
				cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
			}
			var out strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &out
			began := time.Now()
			if err := cmd.Run(); err != nil {
				ts.Fatalf("%s: %v\n%s", r.name, err, out.String())
			}
			r.took = append(r.took, time.Since(began))
			r.peak = max(r.peak, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss<<10)
		}
	}
}

func lookPath(path, name string) (string, error) {
	for _, dir := range filepath.SplitList(path) {
		if info, err := os.Stat(filepath.Join(dir, name)); err == nil && info.Mode()&0o111 != 0 && !info.IsDir() {
			return filepath.Join(dir, name), nil
		}
	}
	return "", fmt.Errorf("%s is not in $PATH", name)
}

// print gives medians, and each as so many times the first.
func (m *meter) print() {
	for _, r := range m.runners {
		if len(r.took) == 0 {
			continue
		}
		slices.Sort(r.took)
		median, first := r.took[len(r.took)/2], m.runners[0].took[len(m.runners[0].took)/2]
		fmt.Printf("%-58s %9s  %5.2f×  %6.1f MiB  (%d runs, %s to %s)\n", r.name, median.Round(time.Millisecond),
			float64(median)/float64(first), float64(r.peak)/(1<<20), len(r.took), r.took[0].Round(time.Millisecond), r.took[len(r.took)-1].Round(time.Millisecond))
	}
}
