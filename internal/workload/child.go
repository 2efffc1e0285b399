package workload

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// StoppedChild finds the one child of caller that is stopped under ptrace by
// caller (PPid = caller, state t, Tgid(TracerPid) = caller) and pins it. None
// or several are errors.
//
// The caller names no pid: a number from it would mean something else in
// another pid namespace, and would let it point at a process that it neither
// started nor holds.
func StoppedChild(caller *Peer) (*Peer, error) {
	if err := caller.Check(); err != nil {
		return nil, err
	}
	pids, err := children(caller.PID)
	if err != nil {
		return nil, err
	}
	found := 0
	for _, pid := range pids {
		ok, err := stoppedBy(pid, caller.PID)
		if errors.Is(err, ErrGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		if found != 0 {
			return nil, fmt.Errorf("process %d: %w", caller.PID, ErrManyStoppedChildren)
		}
		found = pid
	}
	if found == 0 {
		return nil, fmt.Errorf("process %d: %w", caller.PID, ErrNoStoppedChild)
	}
	return pinChild(found, caller)
}

func pinChild(pid int, caller *Peer) (*Peer, error) {
	now, err := bootTicks()
	if err != nil {
		return nil, err
	}
	p := &Peer{PID: pid, pidfd: -1}
	if err := p.pin(now); err != nil {
		return nil, err
	}
	// Again, now that it is pinned: the number found above may have been reused.
	ok, err := stoppedBy(pid, caller.PID)
	if err == nil && !ok {
		err = ErrNoStoppedChild
	}
	if err == nil {
		var s procStatus
		if s, err = readStatus(pid); err == nil {
			p.UID, p.GID = s.euid, s.egid
			err = p.Check()
		}
	}
	if err == nil {
		err = caller.Check()
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// StillStopped fails unless child is pinned, alive and stopped under caller's
// trace: what was measured of it cannot have run on.
func StillStopped(child, caller *Peer) error {
	if err := child.Check(); err != nil {
		return err
	}
	ok, err := stoppedBy(child.PID, caller.PID)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("process %d: %w", child.PID, ErrNoStoppedChild)
	}
	return caller.Check()
}

func stoppedBy(pid, caller int) (bool, error) {
	s, err := readStatus(pid)
	if err != nil {
		return false, err
	}
	if s.ppid != caller || s.state != 't' || s.tracer == 0 || s.tgid != pid {
		return false, nil
	}
	// TracerPid is a thread: any thread of the caller may hold the trace.
	t, err := readStatus(s.tracer)
	if err != nil {
		return false, err
	}
	return t.tgid == caller, nil
}

// children lists the children of every thread of pid.
func children(pid int) ([]int, error) {
	tasks, err := threads(pid)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, tid := range tasks {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, tid))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			if _, serr := os.Stat("/proc/self/task/" + strconv.Itoa(os.Getpid()) + "/children"); serr != nil {
				return scanChildren(pid) // a kernel without CONFIG_PROC_CHILDREN
			}
			continue // the thread ended
		}
		if err != nil {
			return nil, procErr(pid, err)
		}
		for f := range strings.FieldsSeq(string(b)) {
			n, err := strconv.Atoi(f)
			if err != nil {
				return nil, fmt.Errorf("malformed children of process %d: %w", pid, err)
			}
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// scanChildren reads the whole of /proc.
func scanChildren(pid int) ([]int, error) {
	names, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var out []int
	for _, name := range names {
		n, err := strconv.Atoi(filepath.Base(name))
		if err != nil {
			continue
		}
		st, err := readStat(n)
		if errors.Is(err, ErrGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if st.ppid == pid {
			out = append(out, n)
		}
	}
	return out, nil
}

func threads(pid int) ([]int, error) {
	ents, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, procErr(pid, err)
	}
	out := make([]int, 0, len(ents))
	for _, e := range ents {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, fmt.Errorf("malformed task of process %d: %w", pid, err)
		}
		out = append(out, n)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	return out, nil
}

// RecorderProtected reports whether caller connected with the recorder group's
// gid and is not traced; reason says why not.
//
// A process of the same user can exec the genuine recorder over a connection
// of its own, or start it under ptrace and edit its memory. Only an untraced
// exec of the setgid file gives the gid, SO_PEERCRED stamps it at connect, and
// the kernel keeps other processes of the user out of such a process from then on.
func RecorderProtected(caller *Peer, recorderGID uint32) (ok bool, reason string) {
	if recorderGID == 0 {
		return false, "no recorder group is configured"
	}
	if caller.GID != recorderGID {
		return false, fmt.Sprintf("the recorder connected with gid %d, not the recorder group %d: it is not installed setgid, or was started traced, with no_new_privs, or in a user namespace", caller.GID, recorderGID)
	}
	// With 1, a debugging mode of the kernel, processes that gained privileges
	// can be traced by their user from their first instruction on.
	if b, err := os.ReadFile("/proc/sys/fs/suid_dumpable"); err != nil || strings.TrimSpace(string(b)) == "1" {
		return false, "fs.suid_dumpable is 1 or cannot be read, so setgid programs can be traced"
	}
	tids, err := threads(caller.PID)
	if err != nil {
		return false, "its threads cannot be listed: " + err.Error()
	}
	for _, tid := range tids {
		s, err := readStatusFile(caller.PID, fmt.Sprintf("/proc/%d/task/%d/status", caller.PID, tid))
		if errors.Is(err, ErrGone) {
			continue // a thread that ended traces no more
		}
		if err != nil {
			return false, "its threads cannot be read: " + err.Error()
		}
		if s.tracer != 0 {
			return false, fmt.Sprintf("the recorder is traced by process %d", s.tracer)
		}
	}
	if err := caller.Check(); err != nil {
		return false, err.Error()
	}
	return true, ""
}
