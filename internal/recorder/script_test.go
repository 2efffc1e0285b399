package recorder

import (
	"encoding/hex"
	"os"
	"os/exec"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
)

func TestEnvProgram(t *testing.T) {
	for _, tc := range []struct {
		line, name string
		ok         bool
	}{
		{"/bin/sh -e", "", false},
		{"/usr/bin/env bash", "bash", true},
		{"/usr/bin/env -S bash -e", "bash", true},
		{"/usr/bin/env -Sbash -e", "bash", true},
		{"/usr/bin/env --split-string=bash -e", "bash", true},
		{"/usr/bin/env bash -e", "", true}, // one argument, with a blank in it
		{"/usr/bin/env -S PATH=/tmp bash", "", true},
		{"/usr/bin/env -S -i bash", "", true},
		{"/usr/bin/env -S ${SHELL}", "", true},
		{"/usr/bin/env", "", true},
	} {
		if name, ok := envProgram(tc.line); name != tc.name || ok != tc.ok {
			t.Errorf("%q: %q, %t", tc.line, name, ok)
		}
	}
}

// An entry for a script is one for all scripts of its interpreter, and with env
// in between one selector is not enough: whoever is asked to paste the line is
// told.
func TestWhoamiSaysWhatAScriptsIdentityCovers(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	sum, err := files.SHA256(sh)
	if err != nil {
		t.Fatal(err)
	}
	newIssuer(t)
	for _, tc := range []struct {
		first string
		notes []string
	}{
		{"#!/bin/sh", []string{"covers every script"}},
		{"#!/usr/bin/env sh", []string{"covers every script", "add --selector binary:tool:sha256:" + hex.EncodeToString(sum[:]) + " (expected, not measured"}},
		{"#!/usr/bin/env -S X=1 sh", []string{"covers every script", "cannot be said beforehand"}},
		{"#!/usr/bin/env no-such-interpreter", []string{"covers every script", "cannot be said beforehand"}},
	} {
		write(t, "x.sh", tc.first+"\ntouch ran\n")
		if err := os.Chmod("x.sh", 0o755); err != nil {
			t.Fatal(err)
		}
		resp, err := Whoami(Sources{}, []string{"./x.sh"}, false)
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.GetNotes()) != len(tc.notes) {
			t.Fatalf("%s: %q", tc.first, resp.GetNotes())
		}
		for i, want := range tc.notes {
			if !strings.Contains(resp.GetNotes()[i], want) {
				t.Errorf("%s: %q lacks %q", tc.first, resp.GetNotes()[i], want)
			}
		}
	}
	if resp, err := Whoami(Sources{}, []string{"true"}, false); err != nil || len(resp.GetNotes()) != 0 {
		t.Errorf("of a program: %v, %v", resp.GetNotes(), err)
	}
}

func TestHintForAScriptSaysWhatItCovers(t *testing.T) {
	i := newIssuer(t)
	i.measure = func() error {
		return status.Error(codes.PermissionDenied, cli.JoinHint("no identity issued", "run: rootlink-server entry create …"))
	}
	s := newStep(t, "./x.sh")
	write(t, "x.sh", "#!/bin/sh\necho >out\n")
	if err := os.Chmod("x.sh", 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := s.Run()
	if h := cli.HintOf(err); cli.ExitCode(err) != cli.ExitRun || !strings.Contains(h, "entry create") || !strings.Contains(h, "\nnote: ./x.sh is a script") {
		t.Errorf("code %d, hint %q", cli.ExitCode(err), h)
	}
}
