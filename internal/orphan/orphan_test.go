package orphan

import (
	"io"
	"os"
	"os/exec"
	"testing"
	"time"
)

const childVariable = "ORPHAN_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		DieWithParent()
		os.Stdout.WriteString("x")
		time.Sleep(time.Hour)
	}
	os.Exit(m.Run())
}

// A wrapper that is killed takes what it started with it: its end of the pipe
// closes.
func TestDiesWithWrapper(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	wrapper := exec.Command("/bin/sh", "-c", `"$0"; true`, self)
	wrapper.Env = append(os.Environ(), childVariable+"=1")
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	wrapper.Stdout = in
	if err := wrapper.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := wrapper.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = wrapper.Wait() // it was killed
	if err := out.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("it lives on: %v", err)
	}
}
