package cli

import (
	"errors"
	"testing"
)

func TestWorkloadEndpointSection4UnixURI(t *testing.T) {
	for value, want := range map[string]string{
		"unix:///run/rootlink/agent.sock": "/run/rootlink/agent.sock",
		"unix:/run/rootlink/agent.sock":   "/run/rootlink/agent.sock",
		"UNIX:///a":                       "/a", // RFC 3986: schemes know no case
		"unix:///a%20b":                   "/a b",
	} {
		if got, err := EndpointSocket(value); err != nil || got != want {
			t.Errorf("%s: %q, %v", value, got, err)
		}
	}
	for name, value := range map[string]string{
		"no scheme":      "/run/rootlink/agent.sock",
		"other scheme":   "http:///agent.sock",
		"empty":          "",
		"authority":      "unix://host/agent.sock",
		"two slashes":    "unix://agent.sock",
		"user":           "unix://u@/agent.sock",
		"port":           "unix://:1/agent.sock",
		"relative":       "unix:agent.sock",
		"dot relative":   "unix:./agent.sock",
		"no path":        "unix://",
		"root":           "unix:///",
		"query":          "unix:///agent.sock?a=b",
		"empty query":    "unix:///agent.sock?",
		"fragment":       "unix:///agent.sock#a",
		"empty fragment": "unix:///agent.sock#",
		"bad escape":     "unix:///%zz",
		"zero byte":      "unix:///a\x00b",
	} {
		if got, err := EndpointSocket(value); err == nil || errors.Is(err, ErrEndpointTCP) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// A TCP URI that obeys the rules is told apart from one that does not: the
// first is right and not for us.
func TestWorkloadEndpointSection4TCPURI(t *testing.T) {
	for _, value := range []string{"tcp://127.0.0.1:8000", "tcp://[::1]:8000"} {
		if _, err := EndpointSocket(value); !errors.Is(err, ErrEndpointTCP) {
			t.Errorf("%s: %v", value, err)
		}
	}
	for name, value := range map[string]string{
		"path": "tcp://127.0.0.1:8000/foo", "slash": "tcp://127.0.0.1:8000/", "name": "tcp://localhost:8000",
		"no port": "tcp://127.0.0.1", "port 0": "tcp://127.0.0.1:0", "large port": "tcp://127.0.0.1:65536",
		"no host": "tcp://:8000", "user": "tcp://u@127.0.0.1:8000", "query": "tcp://127.0.0.1:8000?a",
		"fragment": "tcp://127.0.0.1:8000#a", "opaque": "tcp:127.0.0.1:8000",
	} {
		if _, err := EndpointSocket(value); err == nil || errors.Is(err, ErrEndpointTCP) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
