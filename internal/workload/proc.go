package workload

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// procStat holds the fields of /proc/PID/stat that we use (proc_pid_stat(5)).
type procStat struct {
	state     byte
	ppid      int
	startTime uint64 // field 22, clock ticks since boot
}

// procStatus holds the fields of /proc/PID/status that we use.
type procStatus struct {
	tgid, ppid, tracer int
	state              byte
	euid, egid         uint32
	capEff             uint64
}

// readProc is os.ReadFile with half the system calls. A process is looked at
// before and after whatever is done for it, so this is done all the time.
func readProc(name string) ([]byte, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 2048)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, &os.PathError{Op: "read", Path: name, Err: err}
		case len(b)+n < cap(b):
			// The kernel makes these files in one piece, so less than was asked
			// for is the end.
			return b[:len(b)+n], nil
		default:
			b = append(b[:len(b)+n], 0)[:len(b)+n]
		}
	}
}

func procErr(pid int, err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
		return fmt.Errorf("process %d: %w", pid, ErrGone)
	case errors.Is(err, os.ErrPermission):
		return &CapabilityError{Missing: missingCapabilities(), PID: pid, Err: err}
	}
	return fmt.Errorf("process %d: %w", pid, err)
}

func readStat(pid int) (procStat, error) {
	b, err := readProc(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return procStat{}, procErr(pid, err)
	}
	return parseStat(b)
}

// parseStat reads from the last ')': the command name before it is the
// process's own choice and may hold spaces, parentheses and newlines.
func parseStat(b []byte) (procStat, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return procStat{}, errors.New("malformed /proc/PID/stat")
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 || len(f[0]) != 1 { // f[0] is field 3
		return procStat{}, errors.New("malformed /proc/PID/stat")
	}
	ppid, err := strconv.Atoi(f[1])
	if err != nil {
		return procStat{}, fmt.Errorf("malformed /proc/PID/stat: %w", err)
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return procStat{}, fmt.Errorf("malformed /proc/PID/stat: %w", err)
	}
	return procStat{state: f[0][0], ppid: ppid, startTime: start}, nil
}

func readStatus(pid int) (procStatus, error) {
	return readStatusFile(pid, fmt.Sprintf("/proc/%d/status", pid))
}

func readStatusFile(pid int, name string) (procStatus, error) {
	b, err := readProc(name)
	if err != nil {
		return procStatus{}, procErr(pid, err)
	}
	return parseStatus(b)
}

// parseStatus wants every field it uses exactly once. The kernel escapes
// newlines in the Name field, so a process cannot write a line of its own.
func parseStatus(b []byte) (procStatus, error) {
	var s procStatus
	seen := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		key, val, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		if !ok {
			continue
		}
		f := strings.Fields(val)
		var err error
		switch key {
		case "State":
			if len(f) == 0 || len(f[0]) != 1 {
				return s, errors.New("malformed /proc/PID/status: State")
			}
			s.state = f[0][0]
		case "Tgid":
			s.tgid, err = one(f)
		case "PPid":
			s.ppid, err = one(f)
		case "TracerPid":
			s.tracer, err = one(f)
		case "Uid":
			s.euid, err = effective(f)
		case "Gid":
			s.egid, err = effective(f)
		case "CapEff":
			if len(f) != 1 {
				return s, errors.New("malformed /proc/PID/status: CapEff")
			}
			s.capEff, err = strconv.ParseUint(f[0], 16, 64)
		default:
			continue
		}
		if err != nil {
			return s, fmt.Errorf("malformed /proc/PID/status: %s: %w", key, err)
		}
		if seen[key] {
			return s, fmt.Errorf("malformed /proc/PID/status: %s twice", key)
		}
		seen[key] = true
	}
	if len(seen) != 7 {
		return s, errors.New("malformed /proc/PID/status: fields missing")
	}
	return s, nil
}

func one(f []string) (int, error) {
	if len(f) != 1 {
		return 0, errors.New("not one number")
	}
	return strconv.Atoi(f[0])
}

// effective takes the second of real, effective, saved and file-system ids.
func effective(f []string) (uint32, error) {
	if len(f) != 4 {
		return 0, errors.New("not four numbers")
	}
	n, err := strconv.ParseUint(f[1], 10, 32)
	return uint32(n), err
}

// missingCapabilities lists what the effective set lacks for looking at other
// users' processes. An unreadable status counts as lacking both.
func missingCapabilities() []string {
	s, err := readStatus(os.Getpid())
	var missing []string
	if err != nil || s.capEff&(1<<unix.CAP_SYS_PTRACE) == 0 {
		missing = append(missing, "CAP_SYS_PTRACE")
	}
	if err != nil || s.capEff&(1<<unix.CAP_DAC_READ_SEARCH) == 0 {
		missing = append(missing, "CAP_DAC_READ_SEARCH")
	}
	return missing
}

// sameNamespace reports whether pid shares our namespace of kind "user", "mnt" or "pid".
func sameNamespace(pid int, kind string) (bool, error) {
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	if err != nil {
		return false, procErr(pid, err)
	}
	ours, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		return false, err
	}
	return theirs == ours, nil
}

// mountOwnerIsOurs reports whether the mount namespace of pid belongs to our
// user namespace, so that only somebody privileged on this host could have
// mounted anything in it.
func mountOwnerIsOurs(pid int) (bool, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, procErr(pid, err)
	}
	defer unix.Close(fd)
	owner, err := unix.IoctlRetInt(fd, unix.NS_GET_USERNS)
	if err != nil {
		// EPERM: the owner is not a descendant of ours, so it is not ours.
		return false, nil
	}
	defer unix.Close(owner)
	var a, b unix.Stat_t
	if err := unix.Fstat(owner, &a); err != nil {
		return false, err
	}
	if err := unix.Stat("/proc/self/ns/user", &b); err != nil {
		return false, err
	}
	return a.Dev == b.Dev && a.Ino == b.Ino, nil
}

// bootTicks returns the time since boot in the unit of procStat.startTime.
func bootTicks() (uint64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, err
	}
	// USER_HZ, what /proc counts in, is 100 on every Linux port Go has.
	return uint64(ts.Nano() / 1e7), nil
}
