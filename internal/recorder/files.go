package recorder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/cli"
)

// maxFiles bounds one recording; at some 300 bytes each that is 75 MB.
const maxFiles = 1 << 18

// Options of Hash.
type Options struct {
	Exclude  []string                 // patterns, see docs/recording.md
	Progress func(files, bytes int64) // called now and then, from several goroutines; may be nil
	// Before is an earlier recording: a file whose identity and times are as
	// they were then is not read again.
	Before *Recording
}

// Recording is a set of hashed files.
type Recording struct {
	// Skipped lists what was met and has no content to hash: name and kind.
	Skipped []string

	roots []root
	files map[string]*file
}

// root is one path that was asked for.
type root struct {
	name  string // relative, slash-separated, clean
	dir   bool
	files []string
}

type file struct {
	sum  [32]byte
	id   fileID
	link bool // met as a symlink; the digest is that of what it points to
	// settled: the file system can be believed, and ctime was old enough when
	// hashing began that a later change must show in it.
	settled bool
}

// Normalise returns the name that a path is recorded under: relative to the
// working directory, slash-separated, without "..".
func Normalise(p string) (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	abs := filepath.Join(wd, p)
	if filepath.IsAbs(p) {
		abs = filepath.Clean(p)
	}
	rel, err := filepath.Rel(wd, abs)
	if err != nil || outside(rel) {
		// The working directory may be known by another name than the path uses.
		realWD, err1 := filepath.EvalSymlinks(wd)
		realDir, err2 := filepath.EvalSymlinks(filepath.Dir(abs))
		if err1 == nil && err2 == nil {
			rel, err = filepath.Rel(realWD, filepath.Join(realDir, filepath.Base(abs)))
		}
	}
	if err != nil || outside(rel) {
		return "", fmt.Errorf("%s is outside the working directory: %w", p, ErrPath)
	}
	return rel, checkName(rel)
}

func outside(rel string) bool { return rel == ".." || strings.HasPrefix(rel, "../") }

func checkName(name string) error {
	if !utf8.ValidString(name) {
		return fmt.Errorf("%q is not UTF-8: %w", name, ErrPath)
	}
	return nil
}

// Hash hashes files, and the files in directories, in parallel. A file that
// changes meanwhile is an error.
func Hash(ctx context.Context, paths []string, o Options) (*Recording, error) {
	exclude, err := parseGlobs(o.Exclude)
	if err != nil {
		return nil, err
	}
	rec := &Recording{files: map[string]*file{}}
	for _, p := range paths {
		name, err := Normalise(p)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(rec.roots, func(r root) bool { return r.name == name }) {
			continue
		}
		rec.roots = append(rec.roots, root{name: name})
	}
	g, ctx := errgroup.WithContext(ctx)
	q := newQueue()
	h := &hasher{progress: o.Progress}
	for range max(2, runtime.GOMAXPROCS(0)) {
		g.Go(func() error {
			err := h.work(ctx, q)
			if err != nil {
				q.close() // lets the walker and the other workers go
			}
			return err
		})
	}
	g.Go(func() error {
		defer q.close()
		w := &walker{ctx: ctx, rec: rec, q: q, exclude: exclude, before: o.Before}
		for i := range rec.roots {
			if err := w.root(i); err != nil {
				return err
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	slices.Sort(rec.Skipped)
	rec.Skipped = slices.Compact(rec.Skipped)
	return rec, nil
}

// walker finds the files. Only it touches the recording's maps; workers fill
// in the files it has made.
type walker struct {
	ctx     context.Context
	rec     *Recording
	q       *queue
	exclude globs
	before  *Recording
	at      int    // index of the present root
	real    string // the working directory without symlinks, once it was asked for
}

func (w *walker) root(i int) error {
	w.at = i
	r := &w.rec.roots[i]
	var st unix.Stat_t
	// A path that was named is followed, whatever it is.
	if err := unix.Stat(r.name, &st); err != nil {
		return &os.PathError{Op: "stat", Path: r.name, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		r.dir = true
		return w.dir(r.name)
	case unix.S_IFREG:
		return w.add(r.name, &st, true)
	}
	return fmt.Errorf("%s is neither a file nor a directory: %w", r.name, ErrPath)
}

func (w *walker) dir(dir string) error {
	if err := w.ctx.Err(); err != nil {
		return context.Cause(w.ctx)
	}
	ents, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range ents {
		name := path.Join(dir, e.Name())
		// Git's own files change with every look at the tree; what they say of
		// it is recorded as the commit.
		if e.Name() == ".git" || w.exclude.match(name) {
			continue
		}
		if err := checkName(name); err != nil {
			return err
		}
		if err := w.entry(name); err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) entry(name string) error {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: name, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return w.add(name, &st, false)
	case unix.S_IFDIR:
		return w.dir(name)
	case unix.S_IFLNK:
		err := unix.Stat(name, &st)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
			w.skip(name, "dangling symlink")
		case err != nil:
			return &os.PathError{Op: "stat", Path: name, Err: err}
		case st.Mode&unix.S_IFMT == unix.S_IFREG:
			if err := w.leadsInside(name); err != nil {
				return err
			}
			if err := w.add(name, &st, true); err != nil {
				return err
			}
			w.rec.files[name].link = true
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			w.skip(name, "symlink to a directory") // may lead out of the tree, or round in it
		default:
			w.skip(name, "symlink to a special file")
		}
	case unix.S_IFIFO:
		w.skip(name, "fifo")
	case unix.S_IFSOCK:
		w.skip(name, "socket")
	default:
		w.skip(name, "device")
	}
	return nil
}

// leadsInside refuses a link out of the working directory: its content would be
// recorded as if it were part of the tree, and whoever owns what it leads to
// decides what goes into the step.
func (w *walker) leadsInside(name string) error {
	if w.real == "" {
		wd, err := os.Getwd()
		if err != nil {
			return err
		}
		if w.real, err = filepath.EvalSymlinks(wd); err != nil {
			return err
		}
	}
	to, err := filepath.EvalSymlinks(name)
	if err != nil {
		return err
	}
	if !filepath.IsAbs(to) {
		to = filepath.Join(w.real, to)
	}
	if rel, err := filepath.Rel(w.real, to); err != nil || outside(rel) {
		return cli.Hint(fmt.Errorf("%s is a symlink to %s, outside the working directory: %w", name, to, ErrPath), "copy the file into the tree, or leave the link out with --exclude")
	}
	return nil
}

func (w *walker) skip(name, kind string) {
	w.rec.Skipped = append(w.rec.Skipped, name+": "+kind)
}

func (w *walker) add(name string, st *unix.Stat_t, follow bool) error {
	r := &w.rec.roots[w.at]
	r.files = append(r.files, name)
	if _, ok := w.rec.files[name]; ok {
		return nil // another root had it
	}
	if len(w.rec.files) >= maxFiles {
		return fmt.Errorf("more than %d files: %w", maxFiles, ErrPath)
	}
	f := &file{id: idOf(st)}
	w.rec.files[name] = f
	if w.before != nil {
		if b, ok := w.before.files[name]; ok && b.settled && b.id == f.id {
			*f = *b
			return nil
		}
	}
	if !w.q.put(job{name: name, follow: follow, size: st.Size, out: f}) {
		return w.ctx.Err() // a worker has failed and will say why
	}
	return nil
}

// hasher is what the workers share.
type hasher struct {
	progress     func(files, bytes int64)
	files, bytes atomic.Int64
	fs           trusted
}

func (h *hasher) report(files, bytes int64) {
	n, b := h.files.Add(files), h.bytes.Add(bytes)
	if h.progress != nil && (files == 0 || n%64 == 0) {
		h.progress(n, b)
	}
}
