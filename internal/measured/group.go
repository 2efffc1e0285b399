package measured

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"strconv"
	"strings"

	"github.com/rootlink/rootlink/internal/cli"
)

// DefaultRecorderGroup is the group that rootlink is installed setgid to.
const DefaultRecorderGroup = "rootlink"

// RecorderGroup resolves what an operator named as the group of recorders: ""
// is the default where it exists, "none" is none (gid 0). A group that somebody
// is in does not protect: a member can connect with its gid and pose as the
// recorder.
func RecorderGroup(name string, log *slog.Logger) (gid uint32, err error) {
	if name == "none" {
		return 0, nil
	}
	byDefault := name == ""
	if byDefault {
		name = DefaultRecorderGroup
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		n, nerr := strconv.ParseUint(name, 10, 32)
		switch {
		case byDefault:
			return 0, nil
		case nerr != nil:
			return 0, cli.Usage("create it with `groupadd --system "+name+"`, or say none", "recorder group: %v", err)
		case n == 0:
			return 0, cli.Usage("choose a group of its own", "recorder group: gid 0 is root's")
		}
		g = &user.Group{Name: name, Gid: strconv.FormatUint(n, 10)}
	}
	n, err := strconv.ParseUint(g.Gid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("group %s has gid %q: %w", g.Name, g.Gid, err)
	}
	members, err := groupMembers(g.Gid)
	if err != nil {
		return 0, err
	}
	if len(members) > 0 {
		err := cli.Fail(cli.ExitUsage, fmt.Errorf("recorder group %s has members (%s): each could pose as the recorder", g.Name, strings.Join(members, ", ")),
			"take them out (gpasswd -d USER "+g.Name+"), or use a group of its own")
		if !byDefault {
			return 0, err
		}
		log.Warn("no recorder will count as protected", "error", err, "hint", cli.HintOf(err))
		return 0, nil
	}
	return uint32(n), nil
}

// groupMembers lists who is in a group by /etc/group or has it as primary group
// by /etc/passwd. Directories such as LDAP are not asked.
func groupMembers(gid string) ([]string, error) {
	var out []string
	err := eachLine("/etc/group", func(f []string) {
		if len(f) == 4 && f[2] == gid && f[3] != "" {
			out = append(out, strings.Split(f[3], ",")...)
		}
	})
	if err != nil {
		return nil, err
	}
	err = eachLine("/etc/passwd", func(f []string) {
		if len(f) == 7 && f[3] == gid {
			out = append(out, f[0])
		}
	})
	return out, err
}

func eachLine(path string, fn func(fields []string)) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // no local users at all, as in a scratch container
	}
	if err != nil {
		return err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		fn(strings.Split(strings.TrimSpace(sc.Text()), ":"))
	}
	return sc.Err()
}
