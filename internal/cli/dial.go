package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// MaxSocketPath is the longest Unix socket path in bytes: sun_path holds 108
// with the closing zero.
const MaxSocketPath = 107

// CheckSocketPath says what is wrong with a path before bind or connect would
// say "invalid argument".
func CheckSocketPath(path string) error {
	if path == "" {
		return Usage("", "the socket path is empty")
	}
	if len(path) > MaxSocketPath {
		return Usage("choose a shorter path for the socket, such as one under /run",
			"the socket path is %d bytes long, the system allows %d: %s", len(path), MaxSocketPath, path)
	}
	return nil
}

// ErrForeignSocket means that the process behind a socket belongs to neither
// this user nor root.
var ErrForeignSocket = errors.New("the socket belongs to another user")

// Socket says how to reach a daemon on this machine.
type Socket struct {
	Path   string // "unix:" in front is allowed
	Daemon string // the program that should be listening, for hints
	Flag   string // the flag that names the path, for hints; may be empty
	// OwnOnly refuses a peer that runs as neither this user nor root. An admin
	// socket needs it: whoever binds the path first could otherwise feed a
	// forged trust.json to the person who asks for it.
	OwnOnly bool
}

// Dial connects now, so that the reasons for failing can be told apart, and
// hands the connection to gRPC.
func (s Socket) Dial(ctx context.Context, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	s.Path = strings.TrimPrefix(strings.TrimPrefix(s.Path, "unix://"), "unix:")
	first, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards first, which serves gRPC's first dial
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		mu.Lock()
		c := first
		first = nil
		mu.Unlock()
		if c != nil {
			return c, nil
		}
		return s.connect(ctx)
	}
	opts = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dialer),
		grpc.WithAuthority("localhost"),
	}, opts...)
	conn, err := grpc.NewClient("passthrough:///unix", opts...)
	if err != nil {
		first.Close()
		return nil, err
	}
	conn.Connect()
	return conn, nil
}

func (s Socket) connect(ctx context.Context) (net.Conn, error) {
	if err := CheckSocketPath(s.Path); err != nil {
		return nil, err
	}
	other := ""
	if s.Flag != "" {
		other = fmt.Sprintf(", or name its socket with %s", s.Flag)
	}
	st, err := os.Stat(s.Path)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return nil, &Error{
			Code: ExitInternal, Err: fmt.Errorf("no socket at %s: %w", s.Path, errors.Unwrap(err)),
			Hint: fmt.Sprintf("start %s%s", s.Daemon, other),
		}
	}
	if err == nil && st.Mode().Type() != fs.ModeSocket {
		return nil, Hint(fmt.Errorf("%s is not a socket", s.Path), fmt.Sprintf("name the socket of %s%s", s.Daemon, other))
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", s.Path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		who := "as the user that runs " + s.Daemon + ", or as root"
		if st != nil {
			who = "as " + userName(st.Sys().(*syscall.Stat_t).Uid) + ", who runs " + s.Daemon
		}
		return nil, Hint(fmt.Errorf("may not open the socket %s: %w", s.Path, syscall.EACCES), "run the command "+who)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, Hint(fmt.Errorf("nobody answers at %s: %w", s.Path, syscall.ECONNREFUSED),
			fmt.Sprintf("%s is not running; start it%s", s.Daemon, other))
	case err != nil:
		return nil, err
	}
	if s.OwnOnly {
		if err := checkPeer(c.(*net.UnixConn), s); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

func checkPeer(c *net.UnixConn, s Socket) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if me := os.Geteuid(); cred.Uid != 0 && int(cred.Uid) != me {
		return &Error{
			Code: ExitInternal,
			Err:  fmt.Errorf("%s: %w: %s listens there, this is %s", s.Path, ErrForeignSocket, userName(cred.Uid), userName(uint32(me))),
			Hint: fmt.Sprintf("if %s is meant to run as %s, run this command as that user too", s.Daemon, userName(cred.Uid)),
		}
	}
	return nil
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return "uid " + id
}

// FromRPC turns a gRPC error into one for the command line: without the
// "rpc error: code =" prefix, and with a wrong argument as a usage error.
func FromRPC(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	if typed, ok := errors.AsType[*Error](err); ok {
		return typed
	}
	return FromStatus(st)
}

// FromStatus is FromRPC for the status of one item of a batch.
func FromStatus(st *status.Status) error {
	e := &Error{Code: ExitInternal, Err: &RPCError{Code: st.Code(), Message: st.Message()}}
	switch st.Code() {
	case codes.InvalidArgument:
		e.Code = ExitUsage
	case codes.ResourceExhausted:
		e.Hint = "free some space for the daemon, or wait if it is a rate that was exceeded; nothing was changed"
	case codes.Internal:
		e.Hint = "look at the daemon's log"
	case codes.Unimplemented:
		e.Hint = "the daemon is older than this command: install both from one build"
	case codes.Unavailable:
		e.Hint = "the daemon went away or is restarting: look at its log"
	case codes.DeadlineExceeded:
		e.Hint = "the daemon did not answer in time: look at its log"
	}
	return e
}

// RPCError is a gRPC status without its wrapping.
type RPCError struct {
	Code    codes.Code
	Message string
}

func (e *RPCError) Error() string {
	if e.Message == "" {
		return e.Code.String()
	}
	return e.Message
}
