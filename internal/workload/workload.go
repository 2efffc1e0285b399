// Package workload turns a process into what can be said of it: who it is on
// this host, and which executable it runs.
//
// Everything here races with the process it looks at, which may exit, exec
// another program or have its pid reused at any moment. The answer is always
// the same: pin first, look, and look again before believing.
package workload

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"unicode"
	"unicode/utf8"
)

// What callers branch on. Messages say what happened; the hint for a person is
// Hint's.
var (
	// ErrGone means that the process, or the very process that was pinned, no
	// longer runs. A reused pid is this too.
	ErrGone = errors.New("the process is gone")
	// ErrForeignPID means that the peer has no pid in our pid namespace.
	ErrForeignPID = errors.New("the peer is outside this pid namespace (pid 0)")
	// ErrChanged means that a process runs another executable than the one
	// measured, or that the file changed meanwhile.
	ErrChanged = errors.New("the executable changed")
	// ErrFileSystem means an executable on a file system whose contents somebody
	// else can change behind the kernel's back.
	ErrFileSystem = errors.New("executable on a file system that is not allowed")
	// ErrBudget means that a user's share of hashing is used up for now.
	ErrBudget = errors.New("hashing budget of the user is used up")
	// ErrTooLarge means an executable over MaxExecutable.
	ErrTooLarge = errors.New("executable too large")
	// ErrNoStoppedChild and ErrManyStoppedChildren are outcomes of StoppedChild.
	ErrNoStoppedChild      = errors.New("no child of the caller is stopped under its trace")
	ErrManyStoppedChildren = errors.New("several children of the caller are stopped under its trace")
)

// CapabilityError names what this process would need to look at another.
type CapabilityError struct {
	Missing []string // CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH
	PID     int      // the process that could not be looked at, 0 when it is about none in particular
	Err     error
}

func (e *CapabilityError) Error() string {
	s := "not permitted to look at processes of other users"
	if e.PID != 0 {
		s = fmt.Sprintf("not permitted to look at process %d", e.PID)
	}
	for i, m := range e.Missing {
		if i == 0 {
			s += ": missing " + m
		} else {
			s += ", " + m
		}
	}
	return s
}

func (e *CapabilityError) Unwrap() error { return e.Err }

// Hint returns what a person can do about err, or "".
func Hint(err error) string {
	var ce *CapabilityError
	switch {
	case errors.Is(err, ErrForeignPID):
		return "run the agent in the host's pid namespace (hostPID: true in Kubernetes, --pid=host in Docker)"
	case errors.As(err, &ce):
		return "run the agent as root, or give it CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH; without them it can measure only processes of its own user that have not gained privileges"
	case errors.Is(err, ErrFileSystem):
		return "run the program from a local disk, or name the file system type in allow_file_systems of the workload attestor if its server is trusted as the host is"
	case errors.Is(err, ErrBudget):
		return "retry in a few seconds; hash_bytes_per_uid of the workload attestor sets the budget"
	case errors.Is(err, ErrManyStoppedChildren):
		return "one connection measures one tool at a time"
	}
	return ""
}

// Measurement is what was seen of one process at one moment.
type Measurement struct {
	PID          int
	StartTime    uint64
	UID, GID     uint32 // effective
	Dev, Inode   uint64
	Size         int64 // of the executable, in bytes
	SHA256       [32]byte
	Path         string    // only when caller and agent share user and mount namespaces
	ParentSHA256 *[32]byte // nil when the parent could not be measured

	id fileID
}

// Selectors returns values without the "binary:" type, sorted: sha256:<hex>,
// uid:<n>, gid:<n>, path:<path>, parent:sha256:<hex>.
func (m *Measurement) Selectors() []string {
	s := []string{
		"sha256:" + hex.EncodeToString(m.SHA256[:]),
		"uid:" + strconv.FormatUint(uint64(m.UID), 10),
		"gid:" + strconv.FormatUint(uint64(m.GID), 10),
	}
	if m.Path != "" {
		s = append(s, "path:"+m.Path)
	}
	if m.ParentSHA256 != nil {
		s = append(s, "parent:sha256:"+hex.EncodeToString(m.ParentSHA256[:]))
	}
	slices.Sort(s)
	return s
}

// maxPath keeps "binary:path:<path>" under the limit of one selector.
const maxPath = 1000

// printablePath reports whether a path can stand in a selector, a log line and
// a terminal without disguise.
func printablePath(p string) bool {
	if p == "" || p[0] != '/' || len(p) > maxPath || !utf8.ValidString(p) {
		return false
	}
	for _, r := range p {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}
