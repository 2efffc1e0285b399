package tlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"

	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// Source is a log as anybody can read it.
type Source interface {
	ReadCheckpoint(ctx context.Context) ([]byte, error)
	ReadTile(ctx context.Context, level, index uint64, partial uint8) ([]byte, error)
	ReadEntryBundle(ctx context.Context, index uint64, partial uint8) ([]byte, error)
}

// FromDir reads the log of a data directory, in use or not.
func FromDir(dataDir string) Source {
	return client.FileFetcher{Root: filepath.Join(dataDir, Dir)}
}

// FromURL reads a log that is served at base, such as https://host/log.
func FromURL(base string) (Source, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, err
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("%q is not an http or https URL", base)
	}
	return client.NewHTTPFetcher(u, logClient())
}

// CheckTree verifies a whole log: the signature on its checkpoint, that the
// entries hash to the root that it names, and every tile that proofs are made
// from. visit, if not nil, is called with each entry in order, before all of
// that is known; what it learns holds only if CheckTree returns no error.
func CheckTree(ctx context.Context, src Source, l pub.Log, ws []pub.Witness, visit func(idx uint64, body []byte) error) (*pub.Checkpoint, []pub.Cosignature, error) {
	signed, err := src.ReadCheckpoint(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("checkpoint: %w", err)
	}
	cp, cosigned, err := pub.OpenCheckpoint(signed, &l, ws)
	if err != nil {
		return nil, nil, err
	}
	t := &treeCheck{src: src, ctx: ctx, size: cp.Size, tiles: map[compact.NodeID][]byte{}}
	tree := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewEmptyRange(0)
	for idx := uint64(0); idx < cp.Size; {
		n := idx / bundleWidth
		p := layout.PartialTileSize(0, n, cp.Size)
		raw, err := src.ReadEntryBundle(ctx, n, p)
		if err != nil {
			return nil, nil, fmt.Errorf("entries from %d: %w", idx, lost(err))
		}
		var bundle api.EntryBundle
		if err := bundle.UnmarshalText(raw); err != nil {
			return nil, nil, fmt.Errorf("%w: entries from %d: %w", ErrLost, idx, err)
		}
		want := int(min(bundleWidth, cp.Size-idx))
		if len(bundle.Entries) < want {
			return nil, nil, fmt.Errorf("%w: %d entries from %d, want %d", ErrLost, len(bundle.Entries), idx, want)
		}
		for _, body := range bundle.Entries[:want] {
			if err := tree.Append(rfc6962.DefaultHasher.HashLeaf(body), t.node); err != nil {
				return nil, nil, err
			}
			if visit != nil {
				if err := visit(idx, body); err != nil {
					return nil, nil, fmt.Errorf("entry %d: %w", idx, err)
				}
			}
			idx++
		}
		if err := t.compare(false); err != nil {
			return nil, nil, err
		}
	}
	if err := t.compare(true); err != nil {
		return nil, nil, err
	}
	root := rfc6962.DefaultHasher.EmptyRoot()
	if cp.Size > 0 {
		if root, err = tree.GetRootHash(nil); err != nil {
			return nil, nil, err
		}
	}
	if !bytes.Equal(root, cp.Root[:]) {
		return nil, nil, fmt.Errorf("%w: its %d entries hash to %x, its checkpoint says %x", ErrLost, cp.Size, root, cp.Root)
	}
	return cp, cosigned, nil
}

// treeCheck collects the tiles that the entries imply.
type treeCheck struct {
	ctx   context.Context
	src   Source
	size  uint64
	tiles map[compact.NodeID][]byte // not compared yet, by level and index of the tile
}

// node takes each hash of the tree once; tiles hold every eighth level.
func (t *treeCheck) node(id compact.NodeID, h []byte) {
	if id.Level%layout.TileHeight == 0 {
		k := compact.NodeID{Level: id.Level / layout.TileHeight, Index: id.Index / layout.TileWidth}
		t.tiles[k] = append(t.tiles[k], h...)
	}
}

// compare compares the tiles that are full, or all that there are, with the
// log's own.
func (t *treeCheck) compare(all bool) error {
	for k, want := range t.tiles {
		if len(want) < layout.TileWidth*rfc6962.DefaultHasher.Size() && !all {
			continue
		}
		level, index := uint64(k.Level), k.Index
		got, err := t.src.ReadTile(t.ctx, level, index, layout.PartialTileSize(level, index, t.size))
		if err != nil {
			return fmt.Errorf("tile %d/%d: %w", level, index, lost(err))
		}
		if len(got) > len(want) {
			got = got[:len(want)] // a full tile in place of a partial one
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%w: tile %d/%d does not hold the hashes of the entries", ErrLost, level, index)
		}
		delete(t.tiles, k)
	}
	return nil
}

// lost: a file that is not there is a loss, anything else a failure to read.
func lost(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	return err
}

// CheckConsistent fetches from src what decides whether its checkpoint
// continues old.
func CheckConsistent(ctx context.Context, src Source, old, now pub.Checkpoint) error {
	var proof [][]byte
	small, large := min(old.Size, now.Size), max(old.Size, now.Size)
	if small > 0 && small < large {
		b, err := client.NewProofBuilder(ctx, large, src.ReadTile)
		if err != nil {
			return err
		}
		if proof, err = b.ConsistencyProof(ctx, small, large); err != nil {
			return err
		}
	}
	return pub.CheckConsistent(old, now, proof)
}

// ReadEntry returns the entry at idx of a log that is read from src.
func ReadEntry(ctx context.Context, src Source, l pub.Log, idx uint64) ([]byte, *pub.Checkpoint, error) {
	signed, err := src.ReadCheckpoint(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("checkpoint: %w", err)
	}
	cp, _, err := pub.OpenCheckpoint(signed, &l, nil)
	if err != nil {
		return nil, nil, err
	}
	body, err := readEntry(ctx, src.ReadEntryBundle, idx, cp.Size)
	return body, cp, err
}
