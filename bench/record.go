package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rootlink/rootlink/bench/figures"
)

const (
	treeFiles = 20000
	treeFile  = 8 << 10   // bytes of each
	treeBig   = 512 << 20 // bytes of one more
)

// makeTree writes a source tree with one large file.
func makeTree(dir string) error {
	r := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, 1<<20)
	for i := range treeFiles {
		if i < 100 {
			if err := os.MkdirAll(filepath.Join(dir, fmt.Sprintf("%02d", i)), 0o700); err != nil {
				return err
			}
		}
		r.Read(buf[:treeFile])
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%02d/%d", i%100, i)), buf[:treeFile], 0o600); err != nil {
			return err
		}
	}
	f, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		return err
	}
	defer f.Close()
	for range treeBig / len(buf) {
		r.Read(buf)
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	return f.Sync()
}

// recorder of the peers' that does what `rootlink run` does here: hash the tree,
// run true, hash the tree, and sign with an SVID of the agent's socket.
type peerRecorder struct {
	name, program string
	least         float64 // how much faster rootlink is to be
	dir           string
	args          []string
	took, cpu     figures.Samples
	peak          int64
}

func (b *bench) peerRecorders(ctx context.Context, tree string) ([]*peerRecorder, error) {
	t, err := tool()
	if err != nil {
		return nil, err
	}
	var out []*peerRecorder
	for _, p := range []*peerRecorder{
		{
			name: "in-toto-golang", least: 4, dir: b.dir,
			args: []string{"run", "--name", "bench", "--materials", "tree", "--products", "tree", "--spiffe-workload-api-path", "unix://" + b.socket(), "--", t},
		},
		{
			name: "witness", least: 3, dir: tree,
			args: []string{"run", "--step", "bench", "--signer-spiffe-socket-path", "unix://" + b.socket(), "--outfile", b.path("witness.json"), "--", t},
		},
	} {
		if p.program, err = peerProgram(p.name); err != nil {
			b.out.Line(p.name+" run of the same", "not measured", "", err.Error())
			continue
		}
		if err := b.enrolPeer(ctx, "/"+p.name, p.program); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// recording: `rootlink run` with a whole tree as materials and as products,
// once just written, so that both passes read all of it, and once older; and
// what others need for the same, in turns.
func recording(ctx context.Context, b *bench) error {
	if err := b.enrolStep(ctx); err != nil {
		return err
	}
	tree := b.path("tree")
	defer os.RemoveAll(tree)
	if err := makeTree(tree); err != nil {
		return err
	}
	peers, err := b.peerRecorders(ctx, tree)
	if err != nil {
		return err
	}
	newest := filepath.Join(tree, "big")
	both := append([]string{"--materials", "tree", "--products", "tree"}, unstamped...)
	plain := append([]string{"--products", "product"}, unstamped...)
	if _, err := b.runStep(ctx, plain...); err != nil { // warms the agent's cache
		return err
	}
	var old, stamped, fresh, sums, empty, cpu, freshCPU figures.Samples
	var memory int64
	if err := settle(newest); err != nil {
		return err
	}
	for i := range 2*b.runs + 1 {
		r, err := b.runStep(ctx, both...)
		if err != nil {
			return err
		}
		old, cpu, memory = append(old, r.took), append(cpu, r.cpu), max(memory, r.peak)
		if r, err = b.runStep(ctx, both[:4]...); err != nil {
			return err
		}
		stamped, memory = append(stamped, r.took), max(memory, r.peak)
		if r, err = b.runStep(ctx, plain...); err != nil {
			return err
		}
		empty = append(empty, r.took)
		// xargs -P2: the way people hash a tree on two cores.
		c := exec.CommandContext(ctx, "sh", "-c", "find tree -type f -size +1M -print0 -o -type f -print0 | xargs -0 -n 256 -P 2 sha256sum >/dev/null")
		if r, err = timed(c, b.dir); err != nil {
			return err
		}
		sums = append(sums, r.took)
		if i >= b.runs {
			continue // the peers need seconds
		}
		for _, p := range peers {
			if r, err = timed(exec.CommandContext(ctx, p.program, p.args...), p.dir); err != nil {
				return err
			}
			p.took, p.cpu, p.peak = append(p.took, r.took), append(p.cpu, r.cpu), max(p.peak, r.peak)
		}
	}
	for range b.runs {
		// A changed time is as good as a new file: neither is believed yet.
		if err := touch(tree); err != nil {
			return err
		}
		r, err := b.runStep(ctx, both...)
		if err != nil {
			return err
		}
		fresh, freshCPU, memory = append(fresh, r.took), append(freshCPU, r.cpu), max(memory, r.peak)
	}
	floor := hashFloor()
	b.out.Most("record 20,000 × 8 KiB and 512 MiB, both ends", old, 600*time.Millisecond,
		fmt.Sprintf("SHA-256 of it from memory, 2 threads: %s; sha256sum by xargs -P2, one end: %s; the same run without files: %s; CPU time: %s",
			figures.Short(floor), figures.Short(sums.Median()), figures.Short(empty.Median()), figures.Short(cpu.Median())))
	b.out.Most("the same, just written: everything read twice", fresh, 0,
		fmt.Sprintf("twice the SHA-256: %s; CPU time: %s", figures.Short(2*floor), figures.Short(freshCPU.Median())))
	b.out.Most("the old tree, with a timestamp and a log entry", stamped, 0, "")
	b.out.Bytes("peak memory of rootlink run for it", memory, 64<<20, "")
	for _, p := range peers {
		b.out.Times(p.name+" run of the same, both ends", p.took, p.least, old,
			fmt.Sprintf("%.1f × ours of a tree just written; CPU time: %s; peak memory %s",
				float64(p.took.Median())/float64(fresh.Median()), figures.Short(p.cpu.Median()), figures.Bytes(p.peak)))
	}
	return nil
}

// touch gives every file of a tree a new ctime.
func touch(tree string) error {
	return filepath.WalkDir(tree, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return os.Chmod(path, 0o600)
	})
}

// hashFloor is how long two threads need for the bytes of the tree when they
// lie in memory: the big file cannot be divided, the others follow it.
func hashFloor() time.Duration {
	var s figures.Samples
	for range 3 {
		var next atomic.Int64
		var wg sync.WaitGroup
		buf := make([]byte, 128<<10)
		start := time.Now()
		for range min(2, runtime.NumCPU()) {
			wg.Go(func() {
				for {
					i := next.Add(1) - 1
					if i > treeFiles {
						return
					}
					h := sha256.New()
					n := treeFile
					if i == 0 {
						n = treeBig
					}
					for ; n > 0; n -= len(buf) {
						h.Write(buf[:min(n, len(buf))])
					}
					h.Sum(nil)
				}
			})
		}
		wg.Wait()
		s = append(s, time.Since(start))
	}
	return s.Median()
}
