package workload

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// fsInfo is what the Measurer needs to know of an executable's file system.
type fsInfo struct {
	name      string
	cacheable bool // its ctime can be believed
}

// localFileSystems hold their data in this kernel's hands: nobody can change a
// file without its ctime telling. Network and user-space file systems can, so
// they are not here; fuse, 9p, nfs, cifs and the like need Options.AllowFileSystems.
var localFileSystems = map[string]bool{
	"ext2": true, "ext3": true, "ext4": true, "xfs": true, "btrfs": true, "f2fs": true,
	"zfs": true, "bcachefs": true, "jfs": true, "erofs": true, "squashfs": true, "iso9660": true,
	"udf": true, "rootfs": false, "tmpfs": false, "ramfs": false, "overlay": false,
}

// fileSystem decides whether fd, an O_PATH handle of pid's executable, lies on
// a file system that is allowed. It asks only the mount table, never the file
// system itself, which could be a FUSE server that does not answer.
func (m *Measurer) fileSystem(pid, fd int) (fsInfo, error) {
	id, err := mountID(fd)
	if err != nil {
		return fsInfo{}, err
	}
	name, err := mountType(pid, id)
	if err != nil {
		return fsInfo{}, err
	}
	if name == "" {
		// Not in the process's mount table: a memfd, or a mount that was
		// detached, lies in yet another namespace, or above a chroot.
		dev, err := deviceOf(fd)
		if err != nil {
			return fsInfo{}, err
		}
		switch {
		case dev == m.memfd:
			return fsInfo{name: "memfd"}, nil
		case dev == m.rootDev && m.rootFS != "":
			// In a chroot the table leaves out the mount that / lies on. What lies
			// on the file system of our own root is as good as we are.
			return fsInfo{name: m.rootFS, cacheable: localFileSystems[m.rootFS]}, nil
		}
		return fsInfo{}, fmt.Errorf("process %d: a mount outside its mount namespace: %w", pid, ErrFileSystem)
	}
	if name == "overlay" {
		// An overlay is as good as its layers. In a user namespace of their own
		// anybody can lay one over a FUSE mount of theirs; in ours only the
		// privileged can.
		for _, check := range []func() (bool, error){
			func() (bool, error) { return sameNamespace(pid, "user") },
			func() (bool, error) { return mountOwnerIsOurs(pid) },
		} {
			ours, err := check()
			if err != nil {
				return fsInfo{}, err
			}
			if !ours {
				return fsInfo{}, fmt.Errorf("process %d: overlay of another user namespace: %w", pid, ErrFileSystem)
			}
		}
	}
	cacheable, ok := localFileSystems[name]
	if !ok && !m.extra[name] {
		return fsInfo{}, fmt.Errorf("process %d: %s: %w", pid, name, ErrFileSystem)
	}
	return fsInfo{name: name, cacheable: cacheable}, nil
}

// mountID returns the id of the mount that fd was opened through.
func mountID(fd int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, fmt.Errorf("no mnt_id in fdinfo")
}

// mountType looks a mount up in the mount table of pid; "" when it is not
// there. Mount ids are unique on the host and fd keeps this one in use.
func mountType(pid, id int) (string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return "", procErr(pid, err)
	}
	defer f.Close()
	want := strconv.Itoa(id)
	s := bufio.NewScanner(f)
	s.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for s.Scan() {
		// ID parent major:minor root mountpoint options [optional…] - type source options
		first, rest, ok := strings.Cut(s.Text(), " ")
		if !ok || first != want {
			continue
		}
		// Blanks inside the fields are written \040, so " - " is the separator.
		_, tail, ok := strings.Cut(rest, " - ")
		if !ok {
			return "", fmt.Errorf("malformed mount table of process %d", pid)
		}
		name, _, _ := strings.Cut(tail, " ")
		return name, nil
	}
	if err := s.Err(); err != nil {
		return "", procErr(pid, err)
	}
	return "", nil
}

// deviceOf is st_dev without asking the file system.
func deviceOf(fd int) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return 0, err
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor), nil
}

// rootFileSystem returns the device and type of the file system that our own
// root lies on; "" for a type that mounts of others could share a device with
// (an overlay, a network) or that is not local.
func rootFileSystem() (dev uint64, name string, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, "/", unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return 0, "", err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err != nil {
		return 0, "", err
	}
	name = map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.F2FS_SUPER_MAGIC: "f2fs",
	}[int64(fs.Type)]
	return unix.Mkdev(st.Dev_major, st.Dev_minor), name, nil
}

// memfdDevice is the device of the kernel's own tmpfs, where every memfd lives.
func memfdDevice() (uint64, error) {
	fd, err := unix.MemfdCreate("rootlink", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return deviceOf(fd)
}
