package main

import (
	"context"
	"os"
	"time"

	"github.com/rootlink/rootlink/bench/figures"
)

// sizes: the programs on disk, and the agent's memory once it has served and
// then had nothing to do for a while.
func sizes(ctx context.Context, b *bench) error {
	for _, name := range []string{"rootlink-server", "rootlink-agent", "rootlink", "rootlink-tpmnode", "rootlink-workloadattestor"} {
		st, err := os.Stat(b.program(name))
		if err != nil {
			return err
		}
		b.out.Bytes(name+", on disk", st.Size(), 40<<20, "")
	}
	select {
	case <-time.After(8 * time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	now, peak, err := figures.RSS(b.agent.cmd.Process.Pid)
	if err != nil {
		return err
	}
	b.out.Bytes("idle agent, resident", now, 40<<20, "its peak until now: "+figures.Bytes(peak))
	if now, peak, err = figures.RSS(b.server.cmd.Process.Pid); err != nil {
		return err
	}
	b.out.Bytes("idle server, resident", now, 0, "its peak until now: "+figures.Bytes(peak))
	return nil
}
