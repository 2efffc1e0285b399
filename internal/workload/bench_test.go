package workload

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// BenchmarkMeasureWarm is what an SVID request costs when the executable has
// been hashed before: its size does not matter then.
func BenchmarkMeasureWarm(b *testing.B) {
	// Under a shell: this test binary is too new for the cache, and would be
	// hashed as the parent each time.
	c := exec.Command("/bin/sh", "-c", "sleep 1000 & echo $!; read x; kill $!")
	in, err := c.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := c.Start(); err != nil {
		b.Fatal(err)
	}
	defer c.Wait()
	defer in.Close()
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		b.Fatal(err)
	}
	m, err := NewMeasurer(Options{})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := m.Measure(b.Context(), pid); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkHash is the speed of the first time, on this test binary.
func BenchmarkHash(b *testing.B) {
	m, err := NewMeasurer(Options{BytesPerUID: 1 << 40})
	if err != nil {
		b.Fatal(err)
	}
	st, err := os.Stat("/proc/self/exe")
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(st.Size())
	for b.Loop() {
		clear(m.cache)
		if _, _, err := m.executable(b.Context(), os.Getpid(), 0); err != nil {
			b.Fatal(err)
		}
	}
}
