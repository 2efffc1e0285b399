// Package orphan keeps plugins from outliving who started them.
package orphan

import (
	"os"

	"golang.org/x/sys/unix"
)

// DieWithParent has the kernel end this process when its parent ends. A host
// arranges that for what it starts itself, not for what a wrapper script starts
// in turn: after kill -9 of the host the plugin would stay, with its lock on the
// TPM's directory and its sockets, and keep the host's next one out. It is called
// first in main, on the thread that lasts.
func DieWithParent() {
	parent := os.Getppid()
	// It fails for a signal that does not exist only.
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	if os.Getppid() != parent { // it ended in between
		os.Exit(1)
	}
}
