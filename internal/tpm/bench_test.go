package tpm_test

import (
	"context"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/tpm"
)

func quoteOnce(b *testing.B, d *tpm.Device) {
	if _, err := d.QuoteNode(context.Background(), pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkIdleQuote connects, loads the AK, quotes, unloads and disconnects.
func BenchmarkIdleQuote(b *testing.B) {
	d := open(b, swtpmtest.Start(b), tpm.Options{})
	quoteOnce(b, d)
	for b.Loop() {
		quoteOnce(b, d)
		b.StopTimer()
		// Idle means that the owner has let go: an operation queued now would
		// find the connection still open.
		time.Sleep(2 * time.Millisecond)
		b.StartTimer()
	}
}

// BenchmarkBusyQuote has the next operation waiting, so that connection and AK
// stay. The difference is what sharing the TPM with other tools costs.
func BenchmarkBusyQuote(b *testing.B) {
	d := open(b, swtpmtest.Start(b), tpm.Options{})
	quoteOnce(b, d)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			quoteOnce(b, d)
		}
	})
}

// BenchmarkReopen is what an idle quote would cost without the saved context.
func BenchmarkReopen(b *testing.B) {
	sw, dir := swtpmtest.Start(b), b.TempDir()
	for b.Loop() {
		d := open(b, sw, tpm.Options{DataDir: dir})
		quoteOnce(b, d)
		d.Close()
	}
}
