package tpm

import (
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"
)

// Kind says how a TPM is reached.
type Kind int

const (
	// KindManaged is a kernel device with a resource manager (/dev/tpmrm*): any
	// number of clients, each with its own handles, which the kernel cleans up.
	KindManaged Kind = iota + 1
	// KindRaw is a kernel device without one (/dev/tpm*): one client at a time.
	KindRaw
	// KindUnix is a Unix socket of a software TPM: one client at a time.
	KindUnix
	// KindTCP is a TCP port of a software TPM: one client at a time.
	KindTCP
)

// Address is a parsed device flag.
type Address struct {
	kind Kind
	path string // file system path, or host:port
}

var managedDevice = regexp.MustCompile(`^tpmrm[0-9]+$`)

// ParseAddress reads a device flag: a path below /dev, unix:PATH or
// tcp:HOST:PORT. It does not look at the device.
func ParseAddress(s string) (Address, error) {
	switch {
	case s == "":
		return Address{}, fmt.Errorf("%w: empty", ErrAddress)
	case strings.ContainsRune(s, 0):
		return Address{}, fmt.Errorf("%w: %q has a NUL byte", ErrAddress, s)
	case strings.HasPrefix(s, "unix:"):
		// unix:///path is a habit from SPIFFE socket addresses.
		p := strings.TrimPrefix(strings.TrimPrefix(s, "unix:"), "//")
		if p == "" {
			return Address{}, fmt.Errorf("%w: %q names no socket", ErrAddress, s)
		}
		return Address{KindUnix, filepath.Clean(p)}, nil
	case strings.HasPrefix(s, "tcp:"):
		hp := strings.TrimPrefix(strings.TrimPrefix(s, "tcp:"), "//")
		host, port, err := net.SplitHostPort(hp)
		if err != nil {
			return Address{}, fmt.Errorf("%w: %q: %w", ErrAddress, s, err)
		}
		if host == "" || port == "" {
			return Address{}, fmt.Errorf("%w: %q needs a host and a port", ErrAddress, s)
		}
		return Address{KindTCP, hp}, nil
	case filepath.IsAbs(s):
		p := filepath.Clean(s)
		if managedDevice.MatchString(filepath.Base(p)) {
			return Address{KindManaged, p}, nil
		}
		return Address{KindRaw, p}, nil
	}
	return Address{}, fmt.Errorf("%w: %q", ErrAddress, s)
}

// Kind says how the TPM is reached.
func (a Address) Kind() Kind { return a.kind }

// Path is the file system path of a device or socket, or HOST:PORT.
func (a Address) Path() string { return a.path }

// String returns the flag again.
func (a Address) String() string {
	switch a.kind {
	case KindUnix:
		return "unix:" + a.path
	case KindTCP:
		return "tcp:" + a.path
	}
	return a.path
}

// exclusive reports whether one client at a time can talk to the TPM, so that
// whoever is connected owns every transient object and session in it.
func (a Address) exclusive() bool { return a.kind != KindManaged }
