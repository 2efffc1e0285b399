package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// sizes: the programs on disk, and the agent's memory once it has served and
// then had nothing to do for a while.
func sizes(ctx context.Context, b *bench) error {
	for _, name := range []string{"rootlink-server", "rootlink-agent", "rootlink", "rootlink-tpmnode", "rootlink-workloadattestor"} {
		st, err := os.Stat(b.program(name))
		if err != nil {
			return err
		}
		b.out.bytes(name+", on disk", st.Size(), 40<<20, "")
	}
	select {
	case <-time.After(8 * time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	now, peak, err := rss(b.agent.cmd.Process.Pid)
	if err != nil {
		return err
	}
	b.out.bytes("idle agent, resident", now, 40<<20, "its peak until now: "+size(peak))
	if now, peak, err = rss(b.server.cmd.Process.Pid); err != nil {
		return err
	}
	b.out.bytes("idle server, resident", now, 0, "its peak until now: "+size(peak))
	return nil
}

// rss returns what a process has in memory, and had at most.
func rss(pid int) (now, peak int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		n, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "VmRSS:":
			now = n << 10
		case "VmHWM:":
			peak = n << 10
		}
	}
	if now == 0 || peak == 0 {
		return 0, 0, errors.New("the kernel does not say how much memory a process has")
	}
	return now, peak, nil
}
