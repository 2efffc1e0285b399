package workload

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rootlink/rootlink/internal/needs"
)

func settled(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, ok, err := statID(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

// An owner can run a program, so that its hash is kept, and then exchange its
// blocks with those of another file by an ioctl of ext4 or xfs: inode, size and
// times stay. So nothing is kept of what a user may write to.
func TestRefusesToCacheWhatAUserMayExchange(t *testing.T) {
	needs.Root(t)
	exe := filepath.Join(t.TempDir(), "prog")
	copyExe(t, exe)
	for _, tt := range []struct {
		uid  int
		mode os.FileMode
		want bool
	}{
		{0, 0o755, true},
		{65534, 0o755, false},
		{65534, 0o555, false}, // the owner can change that
		{0, 0o775, false},     // also the mask of an access control list
		{0, 0o757, false},
		{0, 0o755, true},
	} {
		if err := os.Chown(exe, tt.uid, -1); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(exe, tt.mode); err != nil {
			t.Fatal(err)
		}
		if got := settled(t, exe); got != tt.want {
			t.Errorf("uid %d, mode %04o: %v", tt.uid, tt.mode, got)
		}
	}
}
