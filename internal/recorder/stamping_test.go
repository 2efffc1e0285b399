package recorder

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/stamp"
)

func TestStampingPlan(t *testing.T) {
	server := announced{[]string{"http://a/tsa", "http://b/tsa"}, "http://a/log"}
	for name, c := range map[string]struct {
		typed Stamping
		said  announced
		urls  []string
		needs int
		log   string
	}{
		"nobody":           {Stamping{}, announced{}, nil, 0, ""},
		"the server's":     {Stamping{}, server, server.timestamps, 1, "http://a/log"},
		"all of them":      {Stamping{Needed: "all"}, server, server.timestamps, 2, "http://a/log"},
		"one's own":        {Stamping{TimestampURLs: []string{"https://c"}, Needed: "1"}, server, []string{"https://c"}, 1, "http://a/log"},
		"none":             {Stamping{TimestampURLs: []string{"none"}, LogURL: "none", Needed: "1"}, server, nil, 0, ""},
		"another log":      {Stamping{LogURL: "https://l/log"}, server, server.timestamps, 1, "https://l/log"},
		"two, said by two": {Stamping{Needed: "2"}, server, server.timestamps, 2, "http://a/log"},
	} {
		p, err := c.typed.plan(c.said)
		if err != nil || !slices.Equal(p.Timestamps, c.urls) || p.Needs() != c.needs || p.Log != c.log {
			t.Errorf("%s: %+v, needs %d, %v", name, p, p.Needs(), err)
		}
	}
	for name, c := range map[string]struct {
		typed Stamping
		said  announced
	}{
		"more than there are":  {Stamping{Needed: "3"}, server},
		"none of them":         {Stamping{Needed: "0"}, server},
		"no number":            {Stamping{Needed: "some"}, server},
		"none and one":         {Stamping{TimestampURLs: []string{"none", "http://a"}}, server},
		"one twice":            {Stamping{TimestampURLs: []string{"http://a", "http://a"}}, server},
		"a file":               {Stamping{TimestampURLs: []string{"file:///etc/passwd"}}, server},
		"a file, by the agent": {Stamping{}, announced{[]string{"file:///etc/passwd"}, ""}},
		"a log in a file":      {Stamping{LogURL: "file:///log"}, server},
	} {
		if p, err := c.typed.plan(c.said); err == nil {
			t.Errorf("%s is taken: %+v", name, p)
		}
	}
	if p, err := (Stamping{Needed: "2"}).final(announced{}); err == nil {
		t.Errorf("two of nobody are taken: %+v", p)
	}
}

func TestStampLineCanBePasted(t *testing.T) {
	got := stampLine(stamp.Plan{Timestamps: []string{"http://a/tsa", "http://b/?x=1&y=2"}, Needed: stamp.All, Log: "http://a/log"}, "it's.sigstore.json")
	want := `rootlink stamp --timestamp-url http://a/tsa --timestamp-url 'http://b/?x=1&y=2' --timestamps-needed 2 --log-url http://a/log 'it'\''s.sigstore.json'`
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestTellerSaysEachReasonOnce(t *testing.T) {
	var said []string
	tell := Teller(func(msg string) { said = append(said, msg) })
	for _, why := range []string{"away", "away", "busy", "away"} {
		tell("timestamp", "http://a", errors.New(why))
	}
	tell("timestamp", "http://b", errors.New("away"))
	if len(said) != 3 || !strings.Contains(said[0], "http://a") {
		t.Errorf("%q", said)
	}
}
