package recorder

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/pkg/link"
)

// caches are the directories that tools of the step take finished work from.
// What lies in one goes into a build without any program being run, so that no
// list of programs shows it.
type caches struct{ seen []link.Cache }

// compilerCaches are recorded when a variable names them; where they lie
// otherwise their tools decide.
var compilerCaches = []string{"CCACHE_DIR", "SCCACHE_DIR"}

// named looks at the caches that the step's own environment names.
func (c *caches) named(env []string) {
	for _, name := range compilerCaches {
		if dir, ok := lookupEnv(env, name); ok && dir != "" {
			c.look(name, dir, dir)
		}
	}
}

// ofGo looks at the caches of a go command that is stopped before its first
// instruction, as it will find them: the variables are its own, which a
// Makefile may have set.
func (c *caches) ofGo(pid int) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		c.add(link.Cache{Name: "GOCACHE", Path: "?", Reason: "the environment of the go command could not be read: " + err.Error()})
		return
	}
	g := goEnv{pid: pid, env: strings.Split(string(raw), "\x00")}
	g.readFiles()
	if prog := g.get("GOCACHEPROG"); prog != "" {
		c.add(link.Cache{Name: "GOCACHEPROG", Path: redact(prog), Reason: "a program serves it, and what from cannot be seen"})
	}
	for _, x := range []struct{ name, dir string }{{"GOCACHE", g.buildCache()}, {"GOMODCACHE", g.moduleCache()}} {
		if x.dir != "" && filepath.IsAbs(x.dir) { // or go itself refuses it
			c.look(x.name, x.dir, inProcess(pid, x.dir))
		}
	}
}

// look records the first look at a directory: whatever comes after it comes
// from the step.
func (c *caches) look(name, path, as string) {
	for _, have := range c.seen {
		if have.Name == name && have.Path == path {
			return
		}
	}
	x := link.Cache{Name: name, Path: strings.ToValidUTF8(path, "\uFFFD")}
	// NONBLOCK: the variable may name a FIFO, which would hold up the whole step.
	switch d, err := os.OpenFile(as, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0); {
	case errors.Is(err, os.ErrNotExist):
		x.Fresh = true
	case err != nil:
		x.Reason = "it could not be looked at"
	default:
		_, err := d.Readdirnames(1)
		d.Close()
		if x.Fresh = errors.Is(err, io.EOF); !x.Fresh {
			x.Reason = "it was not empty when the step first had it"
		}
	}
	c.add(x)
}

func (c *caches) add(x link.Cache) {
	if len(c.seen) == link.MaxCaches-1 {
		x = link.Cache{Name: "more", Path: "?", Reason: "too many caches to list"}
	}
	if len(c.seen) < link.MaxCaches {
		c.seen = append(c.seen, x)
	}
}

func (c *caches) list() []link.Cache { return c.seen }

// goEnv answers as the go command would that has this environment.
type goEnv struct {
	pid   int
	env   []string
	files []string // lines of its configuration, the first that sets a name counts
}

const maxGoEnv = 64 << 10 // bytes of one configuration file

// readFiles reads what `go env -w` has written, and GOROOT/go.env behind it.
func (g *goEnv) readFiles() {
	file, ok := lookupEnv(g.env, "GOENV")
	switch {
	case file == "off":
		file = ""
	case !ok || file == "":
		if dir := g.config("XDG_CONFIG_HOME", ".config"); dir != "" {
			file = filepath.Join(dir, "go/env")
		}
	}
	root, _ := lookupEnv(g.env, "GOROOT")
	if root == "" {
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", g.pid)); err == nil {
			root = filepath.Dir(filepath.Dir(exe))
		}
	}
	if root != "" {
		root = filepath.Join(root, "go.env")
	}
	for _, name := range []string{file, root} {
		if !filepath.IsAbs(name) {
			continue
		}
		f, err := os.OpenFile(inProcess(g.pid, name), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != nil {
			continue
		}
		var b []byte
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
			b, _ = io.ReadAll(io.LimitReader(f, maxGoEnv))
		}
		f.Close()
		g.files = append(g.files, strings.Split(string(b), "\n")...)
	}
}

func (g *goEnv) config(variable, dir string) string {
	if v, _ := lookupEnv(g.env, variable); v != "" {
		return v
	}
	if home, _ := lookupEnv(g.env, "HOME"); home != "" {
		return filepath.Join(home, dir)
	}
	return ""
}

func (g *goEnv) get(name string) string {
	if v, _ := lookupEnv(g.env, name); v != "" {
		return v
	}
	for _, line := range g.files {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && k == name {
			return v
		}
	}
	return ""
}

func (g *goEnv) buildCache() string {
	if v := g.get("GOCACHE"); v != "" {
		return v
	}
	if dir := g.config("XDG_CACHE_HOME", ".cache"); dir != "" {
		return filepath.Join(dir, "go-build")
	}
	return ""
}

func (g *goEnv) moduleCache() string {
	if v := g.get("GOMODCACHE"); v != "" {
		return v
	}
	path := g.get("GOPATH")
	if path == "" {
		path = g.config("", "go")
	}
	first, _, _ := strings.Cut(path, ":")
	if first == "" {
		return ""
	}
	return filepath.Join(first, "pkg/mod")
}
