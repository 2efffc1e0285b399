package stamp

import (
	"errors"
	"net/http"
	"testing"
)

// A server announces URLs; whoever has taken it must not reach the metadata
// service of the builder's cloud through the recorder.
func TestRefusesLinkLocalAddresses(t *testing.T) {
	c := NewClient()
	defer c.Close()
	for _, u := range []string{"http://169.254.169.254/latest", "http://[fe80::1]/", "http://[::ffff:169.254.169.254]/"} {
		_, err := c.do(t.Context(), exchange{method: http.MethodGet, url: u, acceptedType: jsonType, limit: 1})
		if !errors.Is(err, ErrURL) || temporary(err) {
			t.Errorf("%s: %v", u, err)
		}
	}
}
