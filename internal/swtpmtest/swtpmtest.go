// Package swtpmtest gives a test its own software TPM: a real swtpm process with
// an EK certificate from a forged maker. Only tests import it.
package swtpmtest

import (
	"bytes"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// EKKind says which EK certificates are made.
type EKKind int

const (
	// ECCP256 is an ECC P-256 EK (template L-2, NV 0x01c0000a), the default.
	ECCP256 EKKind = iota
	// RSA2048 is an RSA EK (template L-1, NV 0x01c00002).
	RSA2048
	// ECCP384 is a P-384 EK of the high range (template H-3, NV 0x01c00016).
	ECCP384
	// NoEK leaves NV without any EK certificate.
	NoEK
)

type config struct {
	kind        EKKind
	maker       *Maker
	chainInNV   bool
	wrongEKCert []byte
	tcp         bool
}

// Option changes what Start makes.
type Option func(*config)

// WithEK chooses the EK that gets a certificate.
func WithEK(k EKKind) Option { return func(c *config) { c.kind = k } }

// WithMaker uses a maker made earlier, so that several TPMs have one root.
func WithMaker(m *Maker) Option { return func(c *config) { c.maker = m } }

// WithChainInNV puts the maker's intermediate certificate into NV 0x01c00100.
func WithChainInNV() Option { return func(c *config) { c.chainInNV = true } }

// WithEKCertificateOf puts another TPM's EK certificate into this TPM.
func WithEKCertificateOf(other *TPM) Option {
	return func(c *config) { c.wrongEKCert = other.EKCert }
}

// WithTCP lets the TPM listen on a port of the loopback interface.
func WithTCP() Option { return func(c *config) { c.tcp = true } }

// TPM is a running software TPM.
type TPM struct {
	Maker  *Maker
	EKCert []byte // DER; nil with NoEK

	t      testing.TB
	dir    string
	socket string
	port   string // with WithTCP, instead of socket
	cmd    *exec.Cmd
	exited chan struct{}
}

// Start runs a TPM until the test ends.
func Start(t testing.TB, opts ...Option) *TPM {
	t.Helper()
	var c config
	for _, o := range opts {
		o(&c)
	}
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Fatal("swtpm is not installed\nhint: apt-get install swtpm swtpm-tools tpm2-tools")
	}
	// Not t.TempDir: with a long test name its path exceeds the 108 bytes of a
	// socket address. MkdirTemp makes it 0700.
	dir, err := os.MkdirTemp("", "swtpm")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "state"), 0o700); err != nil {
		t.Fatal(err)
	}
	// The TPM goes by itself (see start), its directory does not. What it still
	// writes while it dies may come between, hence twice.
	AtDeath(t, `rm -rf "$1" || { sleep 1; rm -rf "$1"; }`, dir)
	s := &TPM{t: t, dir: dir, socket: filepath.Join(dir, "s"), Maker: c.maker}
	t.Cleanup(func() {
		s.kill(syscall.SIGKILL)
		os.RemoveAll(dir)
	})
	if c.tcp {
		s.port = freePort(t)
	}
	if s.Maker == nil {
		s.Maker = NewMaker(t, "Test TPM Maker")
	}
	s.start()
	if err := s.manufacture(&c); err != nil {
		t.Fatalf("manufacture the TPM: %v", err)
	}
	return s
}

// Device returns the device flag of this TPM.
func (s *TPM) Device() string {
	if s.port != "" {
		return "tcp:127.0.0.1:" + s.port
	}
	return "unix:" + s.socket
}

func (s *TPM) dial() (net.Conn, error) {
	if s.port != "" {
		return net.Dial("tcp", "127.0.0.1:"+s.port)
	}
	return net.Dial("unix", s.socket)
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// Socket returns the path of the socket.
func (s *TPM) Socket() string { return s.socket }

// TCTI returns what tpm2-tools want in TPM2TOOLS_TCTI.
func (s *TPM) TCTI() string { return "swtpm:path=" + s.socket }

// RootPEM returns the maker's root certificate.
func (s *TPM) RootPEM() []byte { return s.Maker.RootPEM() }

func (s *TPM) start() {
	s.t.Helper()
	os.Remove(s.socket) // left behind by a killed process
	log := filepath.Join(s.dir, "log")
	server := "type=unixio,path=" + s.socket
	if s.port != "" {
		server = "type=tcp,port=" + s.port
	}
	s.cmd = exec.Command("swtpm", "socket", "--tpm2",
		"--tpmstate", "dir="+filepath.Join(s.dir, "state"),
		"--server", server,
		"--ctrl", "type=unixio,path="+s.socket+".ctrl",
		"--log", "file="+log,
		"--flags", "not-need-init,startup-clear")
	// Not even a panicking test binary leaves a TPM behind. The signal comes when
	// the thread dies that started the process, so one thread stays with it.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.exited = make(chan struct{})
	started := make(chan error)
	go func(cmd *exec.Cmd, exited chan struct{}) {
		runtime.LockOSThread()
		defer close(exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
	}(s.cmd, s.exited)
	if err := <-started; err != nil {
		s.t.Fatalf("start swtpm: %v", err)
	}
	deadline := time.After(30 * time.Second)
	for {
		c, err := s.dial()
		if err == nil {
			c.Close()
			return
		}
		select {
		case <-s.exited:
			b, _ := os.ReadFile(log)
			s.t.Fatalf("swtpm ended at once: %s", b)
		case <-deadline:
			s.t.Fatalf("swtpm does not listen: %v", err)
		case <-time.After(time.Millisecond): // the socket has no other way to say it is there
		}
	}
}

// kill ends the process by its id and waits for it.
func (s *TPM) kill(sig syscall.Signal) {
	if s.cmd == nil || s.cmd.Process == nil {
		return
	}
	s.cmd.Process.Signal(sig)
	<-s.exited
}

// Stop ends the TPM as a power cut does; Start again with Resume.
func (s *TPM) Stop() { s.kill(syscall.SIGKILL) }

// Resume starts a stopped TPM with the state it had.
func (s *TPM) Resume() { s.t.Helper(); s.start() }

// Restart is an orderly reboot: the same state, resetCount one higher, the clock
// safe.
func (s *TPM) Restart() {
	s.t.Helper()
	s.Do(func(c Sender) error {
		_, err := tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(c)
		return err
	})
	s.kill(syscall.SIGKILL)
	s.start()
}

// RestartUnclean is a power cut: resetCount one higher, safe cleared.
func (s *TPM) RestartUnclean() {
	s.t.Helper()
	s.kill(syscall.SIGKILL)
	s.start()
}

// Clear runs TPM2_Clear, as a firmware setup's "clear TPM" does.
func (s *TPM) Clear() {
	s.t.Helper()
	s.Do(func(c Sender) error {
		_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}}.Execute(c)
		return err
	})
}

// Extend extends a PCR of the SHA-256 bank, also while an agent uses the TPM.
func (s *TPM) Extend(pcr uint32, digest [32]byte) {
	s.t.Helper()
	s.Do(func(c Sender) error {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
				{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]},
			}},
		}.Execute(c)
		return err
	})
}

// AllocateBanks leaves only the named PCR banks enabled and reboots.
func (s *TPM) AllocateBanks(banks ...string) {
	s.t.Helper()
	s.Do(func(c Sender) error {
		// go-tpm lacks TPM2_PCR_Allocate.
		cmd := []byte{
			0x80, 0x02, 0, 0, 0, 0, 0, 0, 0x01, 0x2b, // TPM_ST_SESSIONS, size, command
			0x40, 0, 0, 0x0c, // TPM_RH_PLATFORM
			0, 0, 0, 9, 0x40, 0, 0, 0x09, 0, 0, 0, 0, 0, // empty password
			0, 0, 0, 4,
		}
		for _, b := range []struct {
			name string
			alg  byte
		}{{"sha1", 0x04}, {"sha256", 0x0b}, {"sha384", 0x0c}, {"sha512", 0x0d}} {
			bits := byte(0)
			if slices.Contains(banks, b.name) {
				bits = 0xff
			}
			cmd = append(cmd, 0, b.alg, 3, bits, bits, bits)
		}
		binary.BigEndian.PutUint32(cmd[2:], uint32(len(cmd)))
		rsp, err := c.Send(cmd)
		if err == nil && !bytes.Equal(rsp[6:10], make([]byte, 4)) {
			err = fmt.Errorf("TPM2_PCR_Allocate: response code %x", rsp[6:10])
		}
		return err
	})
	s.Restart()
}

// Lockout brings the TPM into dictionary-attack lockout.
func (s *TPM) Lockout() {
	s.t.Helper()
	s.Do(func(c Sender) error {
		// go-tpm lacks TPM2_DictionaryAttackParameters. With newMaxTries 0 the TPM
		// is in lockout at once.
		rsp, err := c.Send([]byte{
			0x80, 0x02, 0, 0, 0, 39, 0, 0, 0x01, 0x3a, // TPM_ST_SESSIONS, size, command
			0x40, 0, 0, 0x0a, // TPM_RH_LOCKOUT
			0, 0, 0, 9, 0x40, 0, 0, 0x09, 0, 0, 0, 0, 0, // empty password
			0, 0, 0, 0, 0, 0, 0x03, 0xe8, 0, 0, 0x03, 0xe8, // tries, recovery times in seconds
		})
		if err == nil && !bytes.Equal(rsp[6:10], make([]byte, 4)) {
			err = fmt.Errorf("TPM2_DictionaryAttackParameters: response code %x", rsp[6:10])
		}
		return err
	})
}

// Handles lists the TPM's handles of the type of first, e.g. 0x80000000.
func (s *TPM) Handles(first uint32) []tpm2.TPMHandle {
	s.t.Helper()
	var out []tpm2.TPMHandle
	s.Do(func(c Sender) error {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(c)
		if err != nil {
			return err
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			return err
		}
		out = list.Handle
		return nil
	})
	return out
}

// Sender is a connection to the TPM for go-tpm.
type Sender interface{ Send([]byte) ([]byte, error) }

// Do runs fn on a connection of its own, when an agent that uses the TPM next
// pauses: swtpm serves clients one after another, the others wait in its backlog.
func (s *TPM) Do(fn func(Sender) error) {
	s.t.Helper()
	if err := s.with(fn); err != nil {
		s.t.Fatalf("swtpm: %v", err)
	}
}

func (s *TPM) with(fn func(Sender) error) error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		return err
	}
	return fn(sender{c})
}

// sender is deliberately not internal/tpm's transport: it judges that one.
type sender struct{ c net.Conn }

func (s sender) Send(cmd []byte) ([]byte, error) {
	if _, err := s.c.Write(cmd); err != nil {
		return nil, err
	}
	buf := make([]byte, 8192)
	n, err := s.c.Read(buf) // swtpm writes a response at once
	if err != nil {
		return nil, err
	}
	if n < 10 {
		return nil, errors.New("short response")
	}
	return buf[:n], nil
}

// RootPEM returns the root certificate of the maker.
func (m *Maker) RootPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Root.Raw})
}

// IntermediatePEM returns the certificate between root and EK certificates.
func (m *Maker) IntermediatePEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Intermediate.Raw})
}

func wrap(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
