package measured

import (
	"log/slog"
	"os/user"
	"strings"
	"testing"
)

func TestRefusesRecorderGroupWithMembers(t *testing.T) {
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if u.Gid == "0" { // refused for another reason; nobody's group has a member too
		if u, err = user.Lookup("nobody"); err != nil {
			t.Fatal(err)
		}
	}
	log := slog.New(slog.DiscardHandler)
	if _, err := RecorderGroup(u.Gid, log); err == nil || !strings.Contains(err.Error(), "members") {
		t.Errorf("group %s of %s: %v", u.Gid, u.Username, err)
	}
	if gid, err := RecorderGroup("3999999999", log); err != nil || gid != 3999999999 {
		t.Errorf("a group that nobody is in: %d %v", gid, err)
	}
	if gid, err := RecorderGroup("none", log); err != nil || gid != 0 {
		t.Errorf("none: %d %v", gid, err)
	}
}
