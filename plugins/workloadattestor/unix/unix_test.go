package unix

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/workload"
)

func configured(t *testing.T, text string) *Plugin {
	t.Helper()
	p := New(nil)
	if _, err := p.Configure(t.Context(), &configv1.ConfigureRequest{HclConfiguration: text}); err != nil {
		t.Fatal(err)
	}
	return p
}

func attest(t *testing.T, p *Plugin, pid int) []string {
	t.Helper()
	r, err := p.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(pid)})
	if err != nil {
		t.Fatal(err)
	}
	return r.SelectorValues
}

// child starts /bin/sleep with these groups, where the tests may do that.
func child(t *testing.T, cred *syscall.Credential) int {
	t.Helper()
	c := exec.CommandContext(t.Context(), "sleep", "60")
	if os.Geteuid() == 0 {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	return c.Process.Pid
}

func TestAttest(t *testing.T) {
	cred := &syscall.Credential{Uid: 4000000001, Gid: 1, Groups: []uint32{0, 4000000002}}
	want := []string{"uid:4000000001", "gid:1", "group:" + groupName(t, 1), "supplementary_gid:0", "supplementary_group:" + groupName(t, 0), "supplementary_gid:4000000002"}
	if os.Geteuid() != 0 {
		want = own(t)
	}
	if got := attest(t, configured(t, ""), child(t, cred)); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// own are the selectors of this process's children.
func own(t *testing.T) []string {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	out := []string{"uid:" + me.Uid, "user:" + me.Username, "gid:" + me.Gid, "group:" + groupName(t, os.Getegid())}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		out = append(out, "supplementary_gid:"+strconv.Itoa(g))
		if n, err := user.LookupGroupId(strconv.Itoa(g)); err == nil {
			out = append(out, "supplementary_group:"+n.Name)
		}
	}
	return out
}

func groupName(t *testing.T, gid int) string {
	t.Helper()
	g, err := user.LookupGroupId(strconv.Itoa(gid))
	if err != nil {
		t.Fatal(err)
	}
	return g.Name
}

func TestPathAndHash(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	path, hash := "path:"+exe, fmt.Sprintf("sha256:%x", sha256.Sum256(b))
	for text, want := range map[string][]string{
		"":                              nil,
		"discover_workload_path = true": {path, hash},
		"discover_workload_path = true\nworkload_size_limit = -1":                      {path},
		fmt.Sprintf("discover_workload_path = true\nworkload_size_limit = %d", len(b)): {path, hash},
	} {
		got := attest(t, configured(t, text), os.Getpid())
		got = slices.DeleteFunc(got, func(s string) bool { return !strings.HasPrefix(s, "path:") && !strings.HasPrefix(s, "sha256:") })
		if !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	small := configured(t, fmt.Sprintf("discover_workload_path = true\nworkload_size_limit = %d", len(b)-1))
	if _, err := small.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(os.Getpid())}); err == nil {
		t.Error("an executable over the limit has selectors")
	}
}

// With the measurer of "binary" there is one cache and one set of rules.
func TestSharesAMeasurer(t *testing.T) {
	m, err := workload.NewMeasurer(workload.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := New(func() *workload.Measurer { return m })
	if _, err := p.Configure(t.Context(), &configv1.ConfigureRequest{HclConfiguration: "discover_workload_path = true"}); err != nil {
		t.Fatal(err)
	}
	if p.extra != nil {
		t.Error("it has one of its own")
	}
	if got := attest(t, p, os.Getpid()); !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "sha256:") }) {
		t.Errorf("%q", got)
	}
}

func TestRefusesWhatItCannotLookAt(t *testing.T) {
	p := configured(t, "")
	for pid, want := range map[int32]codes.Code{0: codes.InvalidArgument, -1: codes.InvalidArgument, 1<<31 - 1: codes.Aborted} {
		if r, err := p.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: pid}); status.Code(err) != want {
			t.Errorf("pid %d: %v, %v", pid, r, err)
		}
	}
	if _, err := New(nil).Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(os.Getpid())}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("unconfigured: %v", err)
	}
}

func TestRefusesConfigurations(t *testing.T) {
	for text, want := range map[string]string{
		"discover_workload_paths = true\n": "unknown key discover_workload_paths (line 1)",
		"workload_size_limit = [":          "cannot be read",
	} {
		v, err := New(nil).Validate(t.Context(), &configv1.ValidateRequest{HclConfiguration: text})
		if err != nil || v.Valid || !strings.Contains(strings.Join(v.Notes, " "), want) {
			t.Errorf("%q: %v, %v", text, v, err)
		}
		if _, err := New(nil).Configure(t.Context(), &configv1.ConfigureRequest{HclConfiguration: text}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v", text, err)
		}
	}
}
