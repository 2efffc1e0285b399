package measured

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/rootlink/rootlink/internal/cli"
)

// Listen creates the socket at path, open to every local user: who they are is
// measured, not left to file modes. What stands at path is replaced only if it
// is a dead socket of ours. setting is what its path was given with, for hints.
func Listen(path, setting string) (*net.UnixListener, error) {
	if err := cli.CheckSocketPath(path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	_, statErr := os.Stat(dir)
	err := os.MkdirAll(dir, 0o755)
	if err == nil && errors.Is(statErr, fs.ErrNotExist) {
		// SPIRE's agent starts plugins with umask 0027, which would shut out
		// every workload that is not root.
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		err = fmt.Errorf("directory of the socket: %w", err)
		if errors.Is(err, fs.ErrPermission) {
			err = cli.Hint(err, "name a place of your own with "+setting+", or run the agent as root")
		}
		return nil, err
	}
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	if err := clearStale(path, setting); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	// Whoever can name it may connect, whatever our umask.
	if err := os.Chmod(path, 0o777); err != nil {
		l.Close()
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

// checkDir refuses a directory in which another user could put a socket of
// their own in our place, and hand workloads identities of their making.
func checkDir(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("directory of the socket: %w", err)
	}
	owner := st.Sys().(*syscall.Stat_t).Uid
	if owner != 0 && int(owner) != os.Geteuid() {
		return cli.Hint(fmt.Errorf("directory %s of the socket belongs to uid %d, who could replace the socket", dir, owner),
			"choose a directory that the agent's user or root owns, such as /run/rootlink")
	}
	if st.Mode().Perm()&0o022 != 0 && st.Mode()&fs.ModeSticky == 0 {
		return cli.Hint(fmt.Errorf("directory %s of the socket is writable for others, who could replace the socket", dir),
			"chmod go-w "+dir+", or choose another directory")
	}
	return nil
}

// clearStale removes what an agent that crashed left behind.
func clearStale(path, setting string) error {
	err := cli.ClearStaleSocket(path)
	if err == nil {
		return nil
	}
	hint := ""
	switch {
	case errors.Is(err, cli.ErrNotSocket):
		hint = "remove it, or name another path with " + setting
	case errors.Is(err, cli.ErrForeignSocket):
		hint = "remove it if it is a leftover, or name another path with " + setting
	case errors.Is(err, cli.ErrSocketInUse):
		hint = "stop the other agent, or name another path with " + setting
	}
	return cli.Hint(fmt.Errorf("socket: %w", err), hint)
}

// Connections that one user, and all together, may hold open.
const (
	maxConnsPerUID = 1024
	maxConns       = 4096
)

// NewListener returns a listener whose connections know their Callers. It is
// served with Credentials.
func NewListener(l *net.UnixListener) net.Listener {
	return &listener{UnixListener: l, byUID: make(map[uint32]int)}
}

// listener pins each peer the moment it is accepted.
type listener struct {
	*net.UnixListener

	mu    sync.Mutex
	total int
	byUID map[uint32]int
}

// Accept never fails because of a peer: one that cannot be pinned gets its
// answer on its first call.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		caller := newCaller(c)
		if !l.admit(caller.uid) {
			caller.close()
			c.Close()
			continue
		}
		return &conn{UnixConn: c, caller: caller, l: l}, nil
	}
}

func (l *listener) admit(uid uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxConns || l.byUID[uid] >= maxConnsPerUID {
		return false
	}
	l.total++
	l.byUID[uid]++
	return true
}

func (l *listener) leave(uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.byUID[uid]--; l.byUID[uid] == 0 {
		delete(l.byUID, uid)
	}
}

// conn is a connection that knows who is at its other end.
type conn struct {
	*net.UnixConn
	caller *Caller
	l      *listener
	once   sync.Once
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.caller.close()
		c.l.leave(c.caller.uid)
	})
	return c.UnixConn.Close()
}
