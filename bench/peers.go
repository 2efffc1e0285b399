package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// errNoPeer: a peer was not built. Its lines are left out, and that is said.
var errNoPeer = errors.New("not built; scripts/interop builds the peers, for which it needs the network once")

// peerProgram finds a program of the peers' that scripts/bench had built.
func peerProgram(name string) (string, error) {
	for dir := range strings.SplitSeq(os.Getenv("ROOTLINK_PEERS"), ":") {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); dir != "" && dir != "none" && err == nil && st.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, errNoPeer)
}

// enrolPeer lets a peer sign through the Workload API, as its own executable.
func (b *bench) enrolPeer(ctx context.Context, id, program string) error {
	hash, err := hashFile(program)
	if err != nil {
		return err
	}
	if _, err := b.create(ctx, id, "binary:sha256:"+hash); err != nil {
		return err
	}
	return nil
}
