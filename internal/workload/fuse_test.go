package workload

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/needs"
)

// fuseServer is a FUSE file system with one file, "prog", of its own process:
// it decides at each read what the file holds, and may answer never.
type fuseServer struct {
	dev  int
	prog []byte
	hang atomic.Bool
}

// Operations of the FUSE protocol (linux/fuse.h).
const (
	fuseLookup, fuseForget, fuseGetattr     = 1, 2, 3
	fuseOpen, fuseRead, fuseStatfs          = 14, 15, 17
	fuseRelease, fuseFlush                  = 18, 25
	fuseInit, fuseOpendir                   = 26, 27
	fuseAccess, fuseInterrupt, fuseForgets  = 34, 36, 42
	fuseRootID, fuseProgID                  = 1, 2
	fuseInHeader, fuseInitOut, fuseMaxWrite = 40, 64, 128 << 10
)

func serveFuse(dir, program string, in *bufio.Scanner) error {
	prog, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", dev)
	if err := unix.Mount("fuse", dir, "fuse.attack", 0, opts); err != nil {
		return err
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s := &fuseServer{dev: dev, prog: prog}
	go s.serve()
	fmt.Println("ready")
	for in.Scan() {
		s.hang.Store(true)
		fmt.Println("hanging")
	}
	return nil
}

func (s *fuseServer) serve() {
	b := make([]byte, fuseMaxWrite+4096)
	for {
		n, err := unix.Read(s.dev, b)
		if err == unix.EINTR || err == unix.ENOENT {
			continue
		}
		if err != nil || n < fuseInHeader {
			return
		}
		if s.hang.Load() {
			continue
		}
		s.answer(b[:n])
	}
}

func (s *fuseServer) answer(req []byte) {
	le := binary.NativeEndian
	op, unique, node, arg := le.Uint32(req[4:]), le.Uint64(req[8:]), le.Uint64(req[16:]), req[fuseInHeader:]
	var out []byte
	var errno unix.Errno
	u32 := func(v ...uint32) {
		for _, x := range v {
			out = le.AppendUint32(out, x)
		}
	}
	u64 := func(v ...uint64) {
		for _, x := range v {
			out = le.AppendUint64(out, x)
		}
	}
	attr := func(node uint64) {
		size, mode := uint64(len(s.prog)), uint32(unix.S_IFREG|0o755)
		if node == fuseRootID {
			size, mode = 0, unix.S_IFDIR|0o755
		}
		u64(node, size, size/512, 1, 1, 1) // ctime long ago, whatever happens to the file
		u32(0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
	}
	switch op {
	case fuseForget, fuseForgets, fuseInterrupt:
		return
	case fuseInit:
		u32(7, 31, 0, 0, 0, fuseMaxWrite, 1)
		out = append(out, make([]byte, fuseInitOut-len(out))...)
	case fuseLookup:
		if !bytes.HasPrefix(arg, []byte("prog\x00")) {
			errno = unix.ENOENT
			break
		}
		u64(fuseProgID, 0, 3600, 3600)
		u32(0, 0)
		attr(fuseProgID)
	case fuseGetattr:
		u64(3600)
		u32(0, 0)
		attr(node)
	case fuseOpen, fuseOpendir:
		u64(1)
		u32(0, 0)
	case fuseRead:
		at, size := le.Uint64(arg[8:]), uint64(le.Uint32(arg[16:]))
		if at < uint64(len(s.prog)) {
			out = s.prog[at:min(at+size, uint64(len(s.prog)))]
		}
	case fuseStatfs:
		u64(1, 1, 1, 1, 1)
		u32(4096, 255, 4096, 0)
		out = append(out, make([]byte, 24)...)
	case fuseFlush, fuseRelease, fuseAccess:
	default:
		errno = unix.ENOSYS
	}
	reply := le.AppendUint32(nil, uint32(16+len(out)))
	reply = le.AppendUint32(reply, uint32(-int32(errno)))
	reply = le.AppendUint64(reply, unique)
	unix.Write(s.dev, append(reply, out...))
}

// fuse mounts a FUSE file system of another process at dir.
func fuse(t *testing.T, dir string) *role {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		needs.Missing(t, "no FUSE: %v", err)
	}
	r := startRole(t, self(t), "fuse", dir, self(t))
	r.wait(t, "ready")
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return r
}

func TestRefusesFUSE(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	server := fuse(t, dir)
	r := startRole(t, filepath.Join(dir, "prog"), "wait")
	r.wait(t, "ready")
	// From now on its server answers nothing: whoever asks the file system
	// anything at all waits for ever.
	server.tell(t, "hang")
	server.wait(t, "hanging")
	m := newMeasurer(t, Options{})
	done := make(chan error, 1)
	go func() {
		_, err := m.Measure(t.Context(), r.Process.Pid)
		done <- err
	}()
	select {
	case err := <-done:
		if !errors.Is(err, ErrFileSystem) {
			t.Errorf("an executable on FUSE: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("a FUSE server that does not answer stalls the measurement")
		server.Process.Kill() // lets the stuck thread go
		<-done
	}
	server.Process.Kill() // before r: its exit may need the file system
}

func TestRefusesFUSEUnderOverlay(t *testing.T) {
	needs.Root(t)
	// Anybody can do this in a user namespace of their own: the overlay looks
	// like any container's, and its file is what the FUSE server says it is.
	base := t.TempDir()
	mount(t, "tmpfs", base, "")
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	server := fuse(t, filepath.Join(base, "lower"))
	c := exec.Command(self(t), base, filepath.Join(base, "merged"))
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	}
	r := startCmd(t, c, "overlay-exec")
	r.wait(t, "ready")
	server.tell(t, "hang")
	server.wait(t, "hanging")
	if _, err := newMeasurer(t, Options{}).Measure(t.Context(), r.Process.Pid); !errors.Is(err, ErrFileSystem) {
		t.Errorf("FUSE under an overlay was measured: %v", err)
	}
	server.Process.Kill()
}
