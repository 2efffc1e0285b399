package store

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const killEnv = "ROOTLINK_STORE_TO_FILL"

func TestMain(m *testing.M) {
	if path := os.Getenv(killEnv); path != "" {
		fillUntilKilled(path)
		return
	}
	os.Exit(m.Run())
}

// fillUntilKilled creates entries and prints each ID once it is acknowledged.
func fillUntilKilled(path string) {
	s, err := Open(context.Background(), path, time.Now)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		r, err := s.CreateEntries(context.Background(), []Entry{web(i), web(-i - 1)})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(r[0].Entry.ID, r[1].Entry.ID)
	}
}

// The process is killed at some moment among its writes: whatever it had
// acknowledged is there, and of what it had not, both entries of a transaction
// or neither.
func TestKilledBetweenWriteAndReply(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.db")
	total := 0
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killEnv+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var acknowledged []string
		lines := bufio.NewScanner(out)
		for len(acknowledged) < 2*(5+3*round) && lines.Scan() {
			acknowledged = append(acknowledged, strings.Fields(lines.Text())...)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // acknowledged before the signal came
			if ids := strings.Fields(lines.Text()); len(ids) == 2 {
				acknowledged = append(acknowledged, ids...)
			}
		}
		cmd.Wait() // killed
		s := open(t, path)
		checkMemory(t, s)
		for _, id := range acknowledged {
			if _, err := s.Entry(id); err != nil {
				t.Fatalf("round %d: acknowledged entry %s: %v", round, id, err)
			}
		}
		all, err := s.Entries()
		if err != nil {
			t.Fatal(err)
		}
		if len(all)%2 != 0 {
			t.Fatalf("round %d: half a transaction", round)
		}
		if total += len(acknowledged); len(all) < total {
			t.Fatalf("round %d: %d entries, %d were acknowledged", round, len(all), total)
		}
		// Entries of this round are out of the way of the next.
		for _, e := range all {
			if err := s.DeleteEntry(t.Context(), e.ID); err != nil {
				t.Fatal(err)
			}
		}
		total = 0
		s.Close()
	}
}
