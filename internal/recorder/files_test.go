package recorder

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/pkg/link"
)

func write(t testing.TB, name, body string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(body), 0o644); err != nil {
		t.Fatal(err)
	}
}

func hexSum(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// listing is name → sha256 or dirHash.
func listing(t *testing.T, r *Recording, limit int) map[string]string {
	t.Helper()
	rs, err := r.Resources(limit)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, x := range rs {
		for alg, v := range x.Digest {
			out[x.Name] = strings.TrimPrefix(alg+":"+v, "sha256:")
		}
	}
	return out
}

func TestHash(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	write(t, "src/a.go", "a")
	write(t, "src/deep/b.go", "b")
	write(t, "src/empty", "")
	write(t, "src/gö x\n", "odd")
	write(t, "src/.git/HEAD", "ref")
	write(t, "src/tmp/x.o", "x")
	write(t, "elsewhere/target", "target")
	for name, to := range map[string]string{
		"src/link": "../elsewhere/target", "src/dirlink": "deep", "src/loop": "loop", "src/dangling": "none",
	} {
		if err := os.Symlink(to, name); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo("src/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", "src/sock")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	r, err := Hash(t.Context(), []string{"./src/", filepath.Join(dir, "src/a.go")}, Options{Exclude: []string{"*.o"}})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"src/a.go": hexSum("a"), "src/deep/b.go": hexSum("b"), "src/empty": hexSum(""),
		"src/gö x\n": hexSum("odd"), "src/link": hexSum("target"),
	}
	if d := cmp.Diff(want, listing(t, r, 1024)); d != "" {
		t.Error(d)
	}
	wantSkipped := []string{
		"src/dangling: dangling symlink", "src/dirlink: symlink to a directory",
		"src/fifo: fifo", "src/loop: dangling symlink", "src/sock: socket",
	}
	if d := cmp.Diff(wantSkipped, r.Skipped); d != "" {
		t.Error(d)
	}
}

func TestRefusesMaterialsThatLeaveTheTreeBySymlink(t *testing.T) {
	outside := t.TempDir()
	write(t, filepath.Join(outside, "secret"), "x")
	t.Chdir(t.TempDir())
	write(t, "src/a", "a")
	if err := os.Symlink(outside, "up"); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"absolute": filepath.Join(outside, "secret"), "in two hops": "../up/secret"} {
		if err := os.Symlink(to, "src/link"); err != nil {
			t.Fatal(err)
		}
		if _, err := Hash(t.Context(), []string{"src"}, Options{}); !errors.Is(err, ErrPath) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := Hash(t.Context(), []string{"src"}, Options{Exclude: []string{"src/link"}}); err != nil {
			t.Errorf("%s, left out: %v", name, err)
		}
		if err := os.Remove("src/link"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestHashRefuses(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	write(t, "bad/\xff", "x")
	if err := unix.Mkfifo("fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		path string
		want error
	}{
		{"..", ErrPath},
		{"../x", ErrPath},
		{"/etc/passwd", ErrPath},
		{"a/../../b", ErrPath},
		{"fifo", ErrPath},
		{"bad", ErrPath},
		{"none", fs.ErrNotExist},
	} {
		if _, err := Hash(t.Context(), []string{tc.path}, Options{}); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.path, err, tc.want)
		}
	}
}

func TestHashCancelled(t *testing.T) {
	t.Chdir(t.TempDir())
	for i := range 100 {
		write(t, fmt.Sprint("d/", i), "x")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Hash(ctx, []string{"d"}, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestRefusesFileChangedWhileHashed(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "big", strings.Repeat("x", 3*bigFile))
	changed := false
	_, err := Hash(t.Context(), []string{"big"}, Options{Progress: func(_, n int64) {
		if !changed && n > readBuffer {
			changed = true
			write(t, "big", strings.Repeat("y", 3*bigFile))
		}
	}})
	if !changed || !errors.Is(err, ErrChanged) {
		t.Errorf("changed %v: %v", changed, err)
	}
}

func TestRefusesFileReplacedBeforeItIsRead(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "f", "one")
	var st unix.Stat_t
	if err := unix.Lstat("f", &st); err != nil {
		t.Fatal(err)
	}
	write(t, "g", "two")
	if err := os.Rename("g", "f"); err != nil {
		t.Fatal(err)
	}
	h := &hasher{}
	if err := h.hash(t.Context(), job{name: "f", out: &file{id: idOf(&st)}}, make([]byte, 64)); !errors.Is(err, ErrChanged) {
		t.Errorf("%v", err)
	}
	// Replaced by a symlink to something that must not be read.
	if err := os.Remove("f"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", "f"); err != nil {
		t.Fatal(err)
	}
	if err := h.hash(t.Context(), job{name: "f", out: &file{id: idOf(&st)}}, make([]byte, 64)); !errors.Is(err, unix.ELOOP) {
		t.Errorf("%v", err)
	}
}

func TestBeforeIsUsedOnlyForSettledFiles(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "fresh", "x")
	write(t, "old", "x")
	before, err := Hash(t.Context(), []string{"."}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if before.files["fresh"].settled {
		t.Error("a file whose ctime is now counts as settled")
	}
	// ctime cannot be set: claim that old was settled, with a mark for a digest.
	mark := [32]byte{1}
	before.files["old"].settled, before.files["old"].sum = true, mark
	before.files["fresh"].sum = mark
	after, err := Hash(t.Context(), []string{"."}, Options{Before: before})
	if err != nil {
		t.Fatal(err)
	}
	if s := after.files["old"].sum; s != mark {
		t.Error("an unchanged settled file was read again")
	}
	if s := after.files["fresh"].sum; s == mark {
		t.Error("a fresh file was not read again")
	}
	// A change that keeps size and mtime shows in ctime.
	st, err := os.Stat("old")
	if err != nil {
		t.Fatal(err)
	}
	write(t, "old", "y")
	if err := os.Chtimes("old", st.ModTime(), st.ModTime()); err != nil {
		t.Fatal(err)
	}
	after, err = Hash(t.Context(), []string{"."}, Options{Before: before})
	if err != nil {
		t.Fatal(err)
	}
	if s := after.files["old"].sum; s == mark {
		t.Error("a changed file passed for unchanged")
	}
}

func TestSettledNeedsAgeAndALocalFileSystem(t *testing.T) {
	// /proc is a file system whose ctime means nothing; the system's own
	// files are old.
	for path, want := range map[string]bool{"/bin/sh": true, "/proc/version": false} {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		h := &hasher{}
		out := &file{id: idOf(&st)}
		err = h.hash(t.Context(), job{name: path, follow: true, size: st.Size, out: out}, make([]byte, readBuffer))
		if err == nil && out.settled != want {
			t.Errorf("%s: settled %v (unless / is an overlay)", path, out.settled)
		}
		unix.Close(fd)
	}
}

func TestManyFilesBecomeOneDirHash(t *testing.T) {
	t.Chdir(t.TempDir())
	for i := range 40 {
		write(t, fmt.Sprintf("tree/%02d", i%7*10+i), fmt.Sprint(i))
	}
	write(t, "tree/sub/app", "app")
	write(t, "one", "1")
	r, err := Hash(t.Context(), []string{"tree", "one", "tree/sub/app"}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := listing(t, r, 1024); len(got) != len(r.files) || got["tree/sub/app"] != hexSum("app") {
		t.Errorf("%d listed of %d", len(got), len(r.files))
	}
	got := listing(t, r, 10)
	// As the in-toto digest set defines it, by coreutils.
	c := exec.Command("sh", "-c", "cd tree && find . -type f | cut -c3- | LC_ALL=C sort | xargs -r sha256sum | sha256sum | cut -f1 -d' '")
	out, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"tree": link.DirHashAlg + ":" + strings.TrimSpace(string(out)), "one": hexSum("1"), "tree/sub/app": hexSum("app"),
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if _, err := r.Resources(2); !errors.Is(err, ErrPath) {
		t.Errorf("too many named files: %v", err)
	}
}

// A tree that an earlier step could only record as one dirHash must be matched
// with it: as a material it is listed, and there as a whole too.
func TestLargeMaterialsAreListedAndWhole(t *testing.T) {
	t.Chdir(t.TempDir())
	for i := range link.MaxSubjects + 1 {
		write(t, fmt.Sprintf("large/%04d", i), fmt.Sprint(i))
	}
	write(t, "small/one", "1")
	if err := os.Symlink("0001", "large/link"); err != nil {
		t.Fatal(err)
	}
	r, err := Hash(t.Context(), []string{"large", "small"}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	materials, err := r.Materials()
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Skipped) > 0 {
		t.Errorf("listed and called passed over: %q", r.Skipped)
	}
	products, err := r.Resources(link.MaxSubjects)
	if err != nil {
		t.Fatal(err)
	}
	find := func(rs []link.Resource, name string) map[string]string {
		for _, r := range rs {
			if r.Name == name {
				return r.Digest
			}
		}
		return nil
	}
	if got := find(materials, "large"); got == nil || !maps.Equal(got, find(products, "large")) {
		t.Errorf("as a material %v, as a product %v", got, find(products, "large"))
	}
	if len(materials) != link.MaxSubjects+1+1+1+1 || find(materials, "small") != nil {
		t.Errorf("%d materials", len(materials))
	}
}

func TestGlobs(t *testing.T) {
	for _, tc := range []struct {
		pattern, name string
		want          bool
	}{
		{"*.o", "a/b/c.o", true},
		{"*.o", "a.o/c", false},
		{"node_modules", "x/node_modules", true},
		{"a/*.o", "a/x.o", true},
		{"a/*.o", "a/b/x.o", false},
		{"a/**/x", "a/x", true},
		{"a/**/x", "a/b/c/x", true},
		{"a/**", "a/b", true},
		{"**/x/y", "p/q/x/y", true},
		{"**/x/y", "x/y", true},
		{"./dist/", "dist", true},
		{"/dist/*", "dist/a", true},
		{"a/**/b/**/c", "a/1/b/2/3/c", true},
		{"a/**/b/**/c", "a/1/2/3/c", false},
	} {
		g, err := parseGlobs([]string{tc.pattern})
		if err != nil {
			t.Fatal(err)
		}
		if got := g.match(tc.name); got != tc.want {
			t.Errorf("%s on %s: %v", tc.pattern, tc.name, got)
		}
	}
	for _, bad := range []string{"", "/", "[", "a/[b"} {
		if _, err := parseGlobs([]string{bad}); !errors.Is(err, ErrPath) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	// Exponential in a naive matcher.
	long := strings.Repeat("a/", 2000) + "b"
	g, err := parseGlobs([]string{strings.Repeat("**/a/", 200) + "c"})
	if err != nil {
		t.Fatal(err)
	}
	if g.match(long) {
		t.Error("matched")
	}
}

// BenchmarkRecord is 20,000 files of 8 KiB and one of 512 MiB, as materials
// and then as products; "fresh" has to read all of it twice.
func BenchmarkRecord(b *testing.B) {
	b.Chdir(b.TempDir())
	buf := make([]byte, 8<<10)
	r := rand.NewChaCha8([32]byte{})
	for i := range 20000 {
		r.Read(buf[:64])
		write(b, fmt.Sprintf("tree/%02d/%d", i%100, i), string(buf))
	}
	big := make([]byte, 1<<20)
	f, err := os.Create("tree/zz")
	if err != nil {
		b.Fatal(err)
	}
	for range 512 {
		r.Read(big)
		if _, err := f.Write(big); err != nil {
			b.Fatal(err)
		}
	}
	f.Close()
	twice := func(b *testing.B) {
		for b.Loop() {
			m, err := Hash(b.Context(), []string{"tree"}, Options{})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := Hash(b.Context(), []string{"tree"}, Options{Before: m}); err != nil {
				b.Fatal(err)
			}
		}
		s, err := os.ReadFile("/proc/self/status")
		if err != nil {
			b.Fatal(err)
		}
		for line := range strings.Lines(string(s)) {
			if f := strings.Fields(line); slices.Contains([]string{"VmHWM:"}, f[0]) {
				b.Logf("peak RSS %s kB", f[1])
			}
		}
	}
	b.Run("fresh", func(b *testing.B) {
		for b.Loop() {
			for range 2 {
				if _, err := Hash(b.Context(), []string{"tree"}, Options{}); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	var st unix.Stat_t
	if err := unix.Stat("tree/zz", &st); err != nil {
		b.Fatal(err)
	}
	time.Sleep(time.Until(time.Unix(st.Ctim.Unix()).Add(settleTime + time.Second)))
	b.Run("settled", twice)
}
