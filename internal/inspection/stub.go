package inspection

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// stubArg is the first argument of this program when it starts itself to
// become an inspection's command.
const stubArg = "__inspect"

// stubStatus is where the stub says what went wrong; exec closes it.
const stubStatus = 3

// workDir is where the command finds the artifacts.
const workDir = "/tmp/work"

// IsStub reports whether this process was started to become an inspection.
func IsStub() bool { return len(os.Args) > 1 && os.Args[1] == stubArg }

// RunStub shuts itself in and becomes the command: `rootlink __inspect DIR
// HOMES COMMAND…`. It never returns. It is alone in its namespaces, where it has all
// privileges until it gives them up.
func RunStub() {
	runtime.LockOSThread()
	if len(os.Args) < 5 {
		os.Stderr.WriteString("error: " + stubArg + " is how rootlink starts an inspection; it is not for people\n")
		os.Exit(125)
	}
	unix.CloseOnExec(stubStatus)
	fail := func(what string, err error) {
		fmt.Fprintf(os.NewFile(stubStatus, "status"), "%s: %v", what, err)
		os.Exit(125)
	}
	if os.Getpid() != 1 {
		fail("namespaces", fmt.Errorf("not the first process of its own"))
	}
	if what, err := closeDoors(os.Args[2], strings.Split(os.Args[3], ":")); err != nil {
		fail(what, err)
	}
	path, err := exec.LookPath(os.Args[4])
	if err != nil {
		fail("exec", err)
	}
	fail("exec", unix.Exec(path, os.Args[4:], os.Environ()))
}

// hidden are places of users and services. What is not there hides nothing.
var hidden = []string{"/root", "/home", "/run", "/var/run", "/var/tmp", "/dev/shm", "/mnt", "/media", "/srv"}

// closeDoors makes all that can be seen read-only, hides what is somebody's, and
// gives up every privilege. What fails is named.
func closeDoors(dir string, homes []string) (string, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "mounts", err
	}
	// A mount of the work directory of its own, taken before the rest is closed.
	work, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return "work directory", err
	}
	locked := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	// Devices stay usable: /dev/null is one.
	noWrite := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &noWrite); err != nil {
		return "read-only file systems", err
	}
	hide := func(path, options string) error {
		if st, err := os.Stat(path); err != nil || !st.IsDir() {
			return nil
		}
		return unix.Mount("tmpfs", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options)
	}
	if err := hide("/tmp", "size=1g,nr_inodes=200000,mode=1777"); err != nil {
		return "/tmp", err
	}
	for _, p := range append(hidden, homes...) {
		if p == "" {
			continue
		}
		if err := hide(p, "size=64k,nr_inodes=8,mode=0755"); err != nil {
			return p, err
		}
		if st, err := os.Stat(p); err == nil && st.IsDir() {
			if err := unix.MountSetattr(unix.AT_FDCWD, p, 0, &locked); err != nil {
				return p, err
			}
		}
	}
	// The old /proc names processes whose files could be reached through it.
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		if err := hide("/proc", "size=64k,nr_inodes=8,mode=0555"); err != nil {
			return "/proc", err
		}
	}
	if err := os.Mkdir(workDir, 0o700); err != nil {
		return workDir, err
	}
	if err := unix.MoveMount(work, "", unix.AT_FDCWD, workDir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return workDir, err
	}
	if err := unix.Chdir(workDir); err != nil {
		return workDir, err
	}
	return giveUp()
}

// giveUp leaves the command without a privilege, in its own namespaces either:
// it could open again what was closed.
func giveUp() (string, error) {
	for _, l := range []struct {
		what int
		max  uint64
	}{{unix.RLIMIT_CORE, 0}, {unix.RLIMIT_FSIZE, 4 << 30}, {unix.RLIMIT_NOFILE, 1024}} {
		if err := unix.Setrlimit(l.what, &unix.Rlimit{Cur: l.max, Max: l.max}); err != nil {
			return "limits", err
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return "privileges", err
	}
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && err != unix.EINVAL {
			return "privileges", err
		}
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	none := [2]unix.CapUserData{}
	if err := unix.Capset(&head, &none[0]); err != nil {
		return "privileges", err
	}
	return "", nil
}
