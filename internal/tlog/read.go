package tlog

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
)

const bundleWidth = layout.EntryBundleWidth

// readEntry returns the entry at idx of a tree of the given size.
func readEntry(ctx context.Context, read client.EntryBundleFetcherFunc, idx, size uint64) ([]byte, error) {
	if idx >= size {
		return nil, fmt.Errorf("%w: entry %d of %d", ErrNotLogged, idx, size)
	}
	bundle, err := client.GetEntryBundle(ctx, read, idx/bundleWidth, size)
	if err != nil {
		return nil, err
	}
	if uint64(len(bundle.Entries)) <= idx%bundleWidth {
		return nil, fmt.Errorf("%w: entry %d is missing", ErrLost, idx)
	}
	return bundle.Entries[idx%bundleWidth], nil
}

// unverifiedSize is the size that a checkpoint claims.
func unverifiedSize(signed []byte) (uint64, error) {
	lines := strings.SplitN(string(signed[:min(len(signed), 512)]), "\n", 3)
	if len(lines) < 3 {
		return 0, fmt.Errorf("%w: not a checkpoint", ErrLost)
	}
	return strconv.ParseUint(lines[1], 10, 63)
}
