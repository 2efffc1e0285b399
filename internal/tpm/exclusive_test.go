package tpm

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func TestParseAddress(t *testing.T) {
	for _, c := range []struct {
		in, out string
		kind    Kind
	}{
		{"/dev/tpmrm0", "/dev/tpmrm0", KindManaged},
		{"/dev/tpmrm12", "/dev/tpmrm12", KindManaged},
		{"/dev/tpm0", "/dev/tpm0", KindRaw},
		{"unix:/run/swtpm/s", "unix:/run/swtpm/s", KindUnix},
		{"unix:///run/swtpm/s", "unix:/run/swtpm/s", KindUnix},
		{"unix:s", "unix:s", KindUnix},
		{"tcp:localhost:2321", "tcp:localhost:2321", KindTCP},
		{"tcp:[::1]:2321", "tcp:[::1]:2321", KindTCP},
	} {
		a, err := ParseAddress(c.in)
		if err != nil || a.String() != c.out || a.Kind() != c.kind {
			t.Errorf("%s: %v, %v, %v", c.in, a, a.Kind(), err)
		}
	}
	for _, in := range []string{"", "tpmrm0", "dev/tpmrm0", "unix:", "tcp:", "tcp:localhost", "tcp::2321", "tcp:localhost:", "http://x", "/dev/tpm\x000"} {
		if _, err := ParseAddress(in); !errors.Is(err, ErrAddress) || Hint(err) == "" {
			t.Errorf("%q: err = %v", in, err)
		}
	}
}

// node is a FileInfo of a device that this test cannot make.
type node struct {
	mode fs.FileMode
	stat syscall.Stat_t
}

func (n *node) Name() string       { return "tpmrm0" }
func (n *node) Size() int64        { return 0 }
func (n *node) Mode() fs.FileMode  { return n.mode }
func (n *node) ModTime() time.Time { return time.Time{} }
func (n *node) IsDir() bool        { return false }
func (n *node) Sys() any           { return &n.stat }

func TestRefusesDeviceThatOthersCanOpen(t *testing.T) {
	acc := &accounts{trusted: []uint32{0, 107}, members: map[uint32][]string{50: {"mallory"}}}
	const dev = fs.ModeDevice | fs.ModeCharDevice
	for _, c := range []struct {
		name     string
		mode     fs.FileMode
		uid, gid uint32
		ok       bool
	}{
		{"root only", dev | 0o600, 0, 0, true},
		{"the distribution's default", dev | 0o660, 107, 107, true},
		{"world can read and write", dev | 0o666, 0, 0, false},
		{"world can read", dev | 0o664, 0, 0, false},
		{"world can write", dev | 0o662, 0, 0, false},
		{"another user's", dev | 0o600, 1000, 0, false},
		{"group with members", dev | 0o660, 0, 50, false},
		{"group with members, closed to it", dev | 0o600, 0, 50, true},
		{"group with members can read", dev | 0o640, 0, 50, false},
		{"socket that the world can connect to", fs.ModeSocket | 0o777, 0, 0, false},
		{"socket that the world cannot connect to", fs.ModeSocket | 0o755, 0, 0, true},
		{"socket that a group can connect to", fs.ModeSocket | 0o775, 0, 50, false},
	} {
		n := &node{c.mode, syscall.Stat_t{Uid: c.uid, Gid: c.gid}}
		err := acc.onlyOurs("/dev/tpmrm0", n)
		if c.ok && err != nil || !c.ok && (!errors.Is(err, ErrShared) || Hint(err) == "") {
			t.Errorf("%s: err = %v", c.name, err)
		}
	}
}

func TestRefusesSocketThatOthersCanOpen(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	chmod := func(p string, m os.FileMode) {
		t.Helper()
		if err := os.Chmod(p, m); err != nil {
			t.Fatal(err)
		}
	}
	addr, err := ParseAddress("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	chmod(path, 0o777)
	if err := checkDevice(addr, false); err != nil {
		t.Errorf("in a directory of our own: %v", err)
	}
	acc, err := readAccounts()
	if err != nil {
		t.Fatal(err)
	}
	chmod(dir, 0o755)
	chmod(base, 0o755)
	chmod(filepath.Dir(base), 0o755)
	if err := checkDevice(addr, false); !errors.Is(err, ErrShared) {
		t.Errorf("open to all: err = %v", err)
	}
	if err := checkDevice(addr, true); err != nil {
		t.Errorf("open to all, as allowed: %v", err)
	}
	chmod(path, 0o755)
	if err := checkDevice(addr, false); err != nil {
		t.Errorf("connectable by its owner only: %v", err)
	}
	chmod(dir, 0o777)
	if _, err := acc.closedAbove(path); !errors.Is(err, ErrShared) {
		t.Errorf("replaceable by all: err = %v", err)
	}
	chmod(dir, 0o777|os.ModeSticky)
	if _, err := acc.closedAbove(path); err != nil {
		t.Errorf("in a sticky directory: %v", err)
	}
}

func TestRefusesWhatIsNoTPM(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, flag := range []string{file, "unix:" + file, "/dev/tpmrm-does-not-exist", "unix:/does/not/exist"} {
		if _, err := Open(Options{Address: flag}); !errors.Is(err, ErrUnreachable) || Hint(err) == "" {
			t.Errorf("%s: err = %v", flag, err)
		}
	}
	if _, err := Open(Options{Address: "tcp:127.0.0.1:1"}); !errors.Is(err, ErrShared) {
		t.Errorf("tcp: err = %v", err)
	}
}

func TestLogsAreBoundedAndMayBeAbsent(t *testing.T) {
	dir := t.TempDir()
	if b, err := ReadEventLog(filepath.Join(dir, "none")); b != nil || err != nil {
		t.Errorf("absent: %v, %v", b, err)
	}
	path := filepath.Join(dir, "log")
	if err := os.WriteFile(path, []byte("log"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := ReadEventLog(path); string(b) != "log" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if err := os.Truncate(path, 8<<20+1); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadEventLog(path); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: err = %v", err)
	}
	if b, err := ReadIMALog(path); err != nil || len(b) != 8<<20+1 {
		t.Errorf("as IMA log: %d, %v", len(b), err)
	}
	// A file without a size, as those of securityfs, that never ends.
	if _, err := ReadEventLog("/dev/zero"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("endless: err = %v", err)
	}
}
