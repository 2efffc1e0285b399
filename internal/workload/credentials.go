package workload

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Credentials are whose process it is, as this user namespace sees it.
type Credentials struct {
	UID, GID uint32 // effective
	Groups   []uint32
}

// CredentialsOf reads them. The kernel makes them up of one set of credentials,
// so they belong together.
func CredentialsOf(pid int) (*Credentials, error) {
	if pid <= 0 {
		return nil, ErrForeignPID
	}
	before, err := readStat(pid)
	if err != nil {
		return nil, err
	}
	b, err := readProc(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, procErr(pid, err)
	}
	c, err := parseCredentials(b)
	if err != nil {
		return nil, err
	}
	after, err := readStat(pid)
	if err != nil {
		return nil, err
	}
	if after.startTime != before.startTime {
		return nil, fmt.Errorf("process %d: another process has its pid now: %w", pid, ErrGone)
	}
	return c, nil
}

func parseCredentials(b []byte) (*Credentials, error) {
	s, err := parseStatus(b)
	if err != nil {
		return nil, err
	}
	c := &Credentials{UID: s.euid, GID: s.egid}
	seen := false
	for line := range strings.Lines(string(b)) {
		val, ok := strings.CutPrefix(line, "Groups:")
		if !ok {
			continue
		}
		if seen {
			return nil, errors.New("malformed /proc/PID/status: Groups twice")
		}
		seen = true
		for f := range strings.FieldsSeq(val) {
			n, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("malformed /proc/PID/status: Groups: %w", err)
			}
			c.Groups = append(c.Groups, uint32(n))
		}
	}
	if !seen {
		return nil, errors.New("malformed /proc/PID/status: no Groups")
	}
	return c, nil
}
