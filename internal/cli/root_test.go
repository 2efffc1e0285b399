package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
)

func testRoot() *cobra.Command {
	root := Root("prog", "A program", "v0")
	run := func(err error) func(*cobra.Command, []string) error {
		return func(*cobra.Command, []string) error { return err }
	}
	create := &cobra.Command{Use: "create", Args: cobra.NoArgs, RunE: run(nil)}
	create.Flags().String("name", "", "")
	_ = create.MarkFlagRequired("name")
	root.AddCommand(
		Group("entry", "Entries", create),
		&cobra.Command{Use: "io", RunE: run(fmt.Errorf("open: %w", fs.ErrNotExist))},
		&cobra.Command{Use: "crypto", RunE: run(Fail(ExitCrypto, errors.New("bad signature"), ""))},
		&cobra.Command{Use: "policy", RunE: run(Fail(ExitPolicy, errors.New("no"), "ask"))},
		&cobra.Command{Use: "child", RunE: run(Status(42))},
		&cobra.Command{Use: "json", RunE: func(c *cobra.Command, _ []string) error {
			if !WantsJSON(c) {
				return errors.New("text")
			}
			return PrintJSON(c.OutOrStdout(), map[string]string{"a": "<b>"})
		}},
	)
	return root
}

func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		args   string
		code   int
		stderr []string
	}{
		{"", ExitUsage, []string{"error: prog needs a command", "hint: one of: "}},
		{"--help", ExitOK, nil},
		{"--version", ExitOK, nil},
		{"entri", ExitUsage, []string{`unknown command "entri"`, `hint: did you mean "prog entry"?`}},
		{"entry", ExitUsage, []string{"hint: one of: create"}},
		{"entry nope", ExitUsage, []string{`unknown command "nope" for "prog entry"`}},
		{"entry create", ExitUsage, []string{"name", "hint: see `prog entry create --help`"}},
		{"entry create --name x extra", ExitUsage, []string{"extra"}},
		{"entry create --nome x", ExitUsage, []string{"unknown flag: --nome", "hint: see"}},
		{"entry create --name x", ExitOK, nil},
		{"io --output yaml", ExitUsage, []string{"neither json nor text"}},
		{"io", ExitInternal, []string{"error: open: file does not exist", "hint: check the path"}},
		{"crypto", ExitCrypto, []string{"error: bad signature\n"}},
		{"policy", ExitPolicy, []string{"error: no\nhint: ask\n"}},
		{"child", 42, nil},
		{"json --output json", ExitOK, nil},
	} {
		t.Run(tt.args, func(t *testing.T) {
			var out, errOut bytes.Buffer
			code := Main(t.Context(), testRoot(), strings.Fields(tt.args), &out, &errOut)
			if code != tt.code {
				t.Errorf("exit code %d, want %d; stderr: %s", code, tt.code, &errOut)
			}
			for _, want := range tt.stderr {
				if !strings.Contains(errOut.String(), want) {
					t.Errorf("stderr lacks %q:\n%s", want, &errOut)
				}
			}
			if tt.stderr == nil && errOut.Len() > 0 {
				t.Errorf("unexpected stderr: %s", &errOut)
			}
			if tt.args == "json --output json" && out.String() != "{\n  \"a\": \"<b>\"\n}\n" {
				t.Errorf("stdout %q", &out)
			}
		})
	}
}

func TestHintSurvivesWrapping(t *testing.T) {
	inner := Hint(errors.New("x"), "do this")
	err := Fail(ExitPolicy, fmt.Errorf("outer: %w", inner), "")
	if HintOf(err) != "do this" || ExitCode(err) != ExitPolicy {
		t.Errorf("hint %q, code %d", HintOf(err), ExitCode(err))
	}
	if got := HintOf(&fs.PathError{Op: "write", Err: syscall.ENOSPC}); !strings.Contains(got, "full") {
		t.Errorf("a full disk has hint %q", got)
	}
	if Hint(nil, "x") != nil || Fail(1, nil, "") != nil {
		t.Error("nil did not stay nil")
	}
}

func TestDialExplains(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	stale := filepath.Join(dir, "stale")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, tt := range []struct{ path, want, hint string }{
		{filepath.Join(dir, "none"), "no socket at", "start prog-server, or name its socket with --admin-socket"},
		{plain, "is not a socket", "name the socket of"},
		{stale, "nobody answers", "is not running"},
		{filepath.Join(dir, strings.Repeat("x", 108)), "the system allows 107", "shorter path"},
		{"", "empty", ""},
	} {
		_, err := Socket{Path: tt.path, Daemon: "prog-server", Flag: "--admin-socket", OwnOnly: true}.Dial(t.Context())
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(HintOf(err), tt.hint) {
			t.Errorf("%s: %v, hint %q", tt.path, err, HintOf(err))
		}
	}
}

func TestSignalContextEnds(t *testing.T) {
	ctx, stop := SignalContext()
	defer stop()
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
	if !errors.Is(ctx.Err(), context.Canceled) {
		t.Error(ctx.Err())
	}
}

func TestProgressIsSilentWithoutATerminal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := NewProgress(f)
	p.Printf("%d of %d", 1, 2)
	p.Done()
	if st, _ := f.Stat(); st.Size() != 0 {
		t.Error("progress was written to a file")
	}
}
