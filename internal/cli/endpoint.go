package cli

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
)

// EnvEndpoint names the agent's socket to every SPIFFE client.
const EnvEndpoint = "SPIFFE_ENDPOINT_SOCKET"

// ErrEndpointTCP means that the endpoint is a TCP address. Our agent knows who
// asks from the kernel's record of a Unix socket, which TCP has not.
var ErrEndpointTCP = errors.New("the agent is reached over a Unix socket only")

// EndpointSocket returns the path in a value of SPIFFE_ENDPOINT_SOCKET, by the
// rules of SPIFFE Workload Endpoint §4. They are strict because a value that
// two clients read differently sends one of them to a socket of somebody else.
func EndpointSocket(value string) (string, error) {
	u, err := url.Parse(value)
	if err != nil {
		return "", fmt.Errorf("%s is no URI: %w", EnvEndpoint, err)
	}
	bad := func(why string) error { return fmt.Errorf("%s is %q: %s", EnvEndpoint, value, why) }
	switch {
	case u.Scheme != "unix" && u.Scheme != "tcp":
		return "", bad("the scheme is neither unix nor tcp")
	case u.Opaque != "":
		return "", bad("the path is not absolute")
	case u.User != nil:
		return "", bad("it has a user")
	case strings.ContainsAny(value, "?#"):
		return "", bad("it has a query or a fragment")
	}
	if u.Scheme == "tcp" {
		port, err := strconv.ParseUint(u.Port(), 10, 16)
		if _, ipErr := netip.ParseAddr(u.Hostname()); ipErr != nil {
			return "", bad("the host is not an IP address")
		}
		if err != nil || port == 0 {
			return "", bad("the port is not a TCP port")
		}
		if u.Path != "" {
			return "", bad("a TCP address has no path")
		}
		return "", fmt.Errorf("%s is %q: %w", EnvEndpoint, value, ErrEndpointTCP)
	}
	if u.Host != "" {
		return "", bad("a host stands before the path; a third slash is missing")
	}
	if !filepath.IsAbs(u.Path) || u.Path == "/" {
		return "", bad("it names no absolute path")
	}
	return u.Path, nil
}
