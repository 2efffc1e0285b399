package tpm_test

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// proxy stands between a Device and swtpm and spoils things.
type proxy struct {
	t    *testing.T
	path string
	to   string

	mu    sync.Mutex
	cut   int // commands until the connection is cut, 0: never
	fired bool
	hook  func(c net.Conn, cmd []byte) []byte // an answer instead of the TPM's, or nil
}

func newProxy(t *testing.T, to string) *proxy {
	dir, err := os.MkdirTemp("", "proxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &proxy{t: t, path: filepath.Join(dir, "s"), to: to}
	l, err := net.Listen("unix", p.path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.serve(c) // one at a time, as swtpm
		}
	}()
	return p
}

// cutAfter loses the connection after n more commands have reached the TPM and
// before their answer. The result tells whether it came to that.
func (p *proxy) cutAfter(n int) func() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut, p.fired = n, false
	return func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.cut = 0
		return p.fired
	}
}

// before sends another command before each of the next n commands cc.
func (p *proxy) before(cc tpm2.TPMCC, n int, other []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hook = func(up net.Conn, cmd []byte) []byte {
		if tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:])) == cc && n > 0 {
			n--
			exchange(up, other)
		}
		return nil
	}
}

// answer gives the next n commands cc a response code instead of executing them.
func (p *proxy) answer(cc tpm2.TPMCC, n int, rc tpm2.TPMRC) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hook = func(_ net.Conn, cmd []byte) []byte {
		if tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:])) != cc || n == 0 {
			return nil
		}
		n--
		return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, uint32(rc))
	}
}

func (p *proxy) serve(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("unix", p.to)
	if err != nil {
		return
	}
	defer up.Close()
	for {
		cmd, err := message(c)
		if err != nil {
			return
		}
		p.mu.Lock()
		hook := p.hook
		p.mu.Unlock()
		var rsp []byte
		if hook != nil {
			rsp = hook(up, cmd)
		}
		if rsp == nil {
			if rsp, err = exchange(up, cmd); err != nil {
				return
			}
		}
		p.mu.Lock()
		cut := p.cut == 1
		if p.cut > 0 {
			p.cut--
		}
		p.fired = p.fired || cut
		p.mu.Unlock()
		if cut {
			return
		}
		if _, err := c.Write(rsp); err != nil {
			return
		}
	}
}

func exchange(c net.Conn, cmd []byte) ([]byte, error) {
	if _, err := c.Write(cmd); err != nil {
		return nil, err
	}
	return message(c)
}

func message(c net.Conn) ([]byte, error) {
	h := make([]byte, 10)
	if _, err := io.ReadFull(c, h); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(h[2:]))
	copy(b, h)
	_, err := io.ReadFull(c, b[10:])
	return b, err
}
