package workload

import (
	"strings"
	"testing"
)

func TestParseStatNameIsTheProcessesOwn(t *testing.T) {
	line := "7 (evil) S 1 2 3) t 42 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 12345 0"
	st, err := parseStat([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	if st.state != 't' || st.ppid != 42 || st.startTime != 12345 {
		t.Errorf("%+v", st)
	}
	for _, bad := range []string{"", "1 (x", "1 (x) S", "1 (x) S x 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1"} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestParseStatusRefusesDuplicates(t *testing.T) {
	good := "Name:\tx\nState:\tS (sleeping)\nTgid:\t5\nPPid:\t4\nTracerPid:\t0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nCapEff:\t0000000000080004\n"
	s, err := parseStatus([]byte(good))
	if err != nil || s.euid != 2 || s.egid != 6 || s.tgid != 5 || s.capEff != 0x80004 {
		t.Fatalf("%+v, %v", s, err)
	}
	for _, bad := range []string{good + "TracerPid:\t0\n", strings.Replace(good, "TracerPid", "Other", 1), "", good + "Uid:\t1\n"} {
		if _, err := parseStatus([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestSelectorOfHostilePath(t *testing.T) {
	for _, p := range []string{"relative", "/a\nb", "/a\x1b[0m", "/\xff", "/" + strings.Repeat("x", 1001), ""} {
		if printablePath(p) {
			t.Errorf("%q", p)
		}
	}
	if !printablePath("/usr/bin/gö x") {
		t.Error("a plain path was refused")
	}
}
