package tpm

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// stackAccount is the account that Linux distributions give their TPM device
// nodes to. It runs the TPM software stack and nobody logs in as it, so its
// access does not make the device shared.
const stackAccount = "tss"

// checkDevice fails when there is no device. Unless shared is allowed it also
// fails when others than root, this process's user and the TPM software stack's
// account can open it: who can open it can quote with keys of their own and,
// knowing the AK's authorization, as this node.
func checkDevice(a Address, shared bool) error {
	if a.kind == KindTCP {
		if shared {
			return nil
		}
		return fmt.Errorf("%w: any user of this host can connect to %s", ErrShared, a)
	}
	fi, err := os.Stat(a.path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	want, what := fs.ModeDevice|fs.ModeCharDevice, "a character device"
	if a.kind == KindUnix {
		want, what = fs.ModeSocket, "a Unix socket"
	}
	if fi.Mode()&want != want {
		return fmt.Errorf("%w: %s is not %s", ErrUnreachable, a.path, what)
	}
	if shared {
		return nil
	}
	acc, err := readAccounts()
	if err != nil {
		return err
	}
	if a.kind == KindUnix {
		closed, err := acc.closedAbove(a.path)
		if err != nil || closed {
			return err
		}
	}
	return acc.onlyOurs(a.path, fi)
}

// accounts answers who belongs to which group, from the host's own files. Users
// of a directory service are not in them; docs/plugin-tpmnode.md says so.
type accounts struct {
	trusted []uint32            // uids whose access is ours
	members map[uint32][]string // gid → account names that are not trusted
}

func (a *accounts) trusts(uid uint32) bool { return slices.Contains(a.trusted, uid) }

func readAccounts() (*accounts, error) {
	a := &accounts{trusted: []uint32{0, uint32(os.Geteuid())}, members: map[uint32][]string{}}
	trustedName := map[string]bool{stackAccount: true}
	primary := map[string]uint32{}
	if err := eachLine("/etc/passwd", func(f []string) {
		if len(f) < 4 {
			return
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			return
		}
		if f[0] == stackAccount {
			a.trusted = append(a.trusted, uint32(uid))
		}
		if a.trusts(uint32(uid)) {
			trustedName[f[0]] = true
		}
		primary[f[0]] = uint32(gid)
	}); err != nil {
		return nil, err
	}
	for name, gid := range primary {
		if !trustedName[name] {
			a.members[gid] = append(a.members[gid], name)
		}
	}
	err := eachLine("/etc/group", func(f []string) {
		if len(f) < 4 {
			return
		}
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			return
		}
		for m := range strings.SplitSeq(f[3], ",") {
			if m != "" && !trustedName[m] {
				a.members[uint32(gid)] = append(a.members[uint32(gid)], m)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	for _, m := range a.members {
		slices.Sort(m)
	}
	return a, nil
}

func eachLine(path string, fn func(fields []string)) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("cannot tell who may open the TPM: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if line := sc.Text(); line != "" && line[0] != '#' {
			fn(strings.Split(line, ":"))
		}
	}
	return sc.Err()
}

// onlyOurs judges the permission bits of the device or socket itself. Opening a
// device takes read or write, connecting to a socket takes write.
func (a *accounts) onlyOurs(path string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	mode := fi.Mode().Perm()
	open := fs.FileMode(0o6)
	if fi.Mode()&fs.ModeSocket != 0 {
		open = 0o2
	}
	if mode&open != 0 {
		return fmt.Errorf("%w: %s has mode %04o", ErrShared, path, mode)
	}
	if !a.trusts(st.Uid) {
		return fmt.Errorf("%w: %s belongs to uid %d", ErrShared, path, st.Uid)
	}
	if m := a.members[st.Gid]; mode&(open<<3) != 0 && len(m) > 0 {
		return fmt.Errorf("%w: %s has mode %04o and its group (gid %d) has members: %s", ErrShared, path, mode, st.Gid, strings.Join(m[:min(len(m), 5)], ", "))
	}
	return nil
}

// closedAbove reports whether a directory above path keeps all others out, and
// fails when one lets others replace the socket by their own.
func (a *accounts) closedAbove(path string) (bool, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return false, err
	}
	var replaceable error
	for dir := filepath.Dir(abs); ; dir = filepath.Dir(dir) {
		fi, err := os.Stat(dir)
		if err != nil {
			return false, err
		}
		st := fi.Sys().(*syscall.Stat_t)
		perm := fi.Mode().Perm()
		if perm&0o077 == 0 && a.trusts(st.Uid) {
			return true, nil
		}
		writable := perm&0o002 != 0 || perm&0o020 != 0 && len(a.members[st.Gid]) > 0 || !a.trusts(st.Uid)
		if writable && fi.Mode()&fs.ModeSticky == 0 && replaceable == nil {
			replaceable = fmt.Errorf("%w: others can replace the socket in %s", ErrShared, dir)
		}
		if dir == "/" || dir == "." {
			return false, replaceable
		}
	}
}
