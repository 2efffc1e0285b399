package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"

	"github.com/rootlink/rootlink/internal/forge"
)

// fakeConn is a connection from some address.
type fakeConn struct {
	net.Conn
	from   netip.AddrPort
	closed bool
}

func (c *fakeConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.from) }
func (c *fakeConn) Close() error         { c.closed = true; return nil }

type connWorld struct {
	*connListener
	clock *clock
	log   lockedBuffer
	port  uint16
}

func newConnWorld(most, mostOfAddress int) *connWorld {
	w := &connWorld{clock: &clock{now: forge.Epoch()}}
	w.connListener = newConnListener(nil, &settings{Config: Config{
		MaxConnections: most, MaxConnectionsOfAddress: mostOfAddress, Now: w.clock.Now, Log: slog.New(slog.NewTextHandler(&w.log, nil)),
	}}, new(counters))
	return w
}

func (w *connWorld) connect(from string) (*fakeConn, *serverConn) {
	w.port++
	c := &fakeConn{from: netip.AddrPortFrom(netip.MustParseAddr(from), w.port)}
	return c, w.admit(c)
}

func (w *connWorld) certificate(x *serverConn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.settle(x)
}

// Connections that say nothing do not keep agents out, neither those of one
// address nor those of many, and an agent that is in stays in.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	w := newConnWorld(6, 3)
	agent, x := w.connect("192.0.2.1")
	w.certificate(x)
	first, _ := w.connect("192.0.2.1")
	second, _ := w.connect("192.0.2.1")
	if _, x := w.connect("192.0.2.1"); x == nil || !first.closed || second.closed || agent.closed {
		t.Fatal("the oldest idle connection of a full address did not make room")
	}
	for i := range 3 {
		if _, x := w.connect(fmt.Sprintf("198.51.100.%d", i)); x == nil || second.closed {
			t.Fatal("an address takes another's room while there is some")
		}
	}
	if _, x := w.connect("203.0.113.1"); x == nil || !second.closed || agent.closed {
		t.Fatal("the oldest idle connection of all did not make room")
	}
	if w.open != 6 {
		t.Errorf("%d open", w.open)
	}
}

// Who has few addresses and opens connections without end closes his own.
func TestRefusesToCloseForACrowdsSake(t *testing.T) {
	w := newConnWorld(12, 6)
	recorder, _ := w.connect("192.0.2.1")
	for i := range 500 {
		w.connect(fmt.Sprintf("198.51.100.%d", i%3))
	}
	if recorder.closed {
		t.Fatal("three addresses drove another out")
	}
	next, _ := w.connect("192.0.2.2")
	for i := range 500 {
		w.connect(fmt.Sprintf("198.51.100.%d", i%3))
	}
	if recorder.closed || next.closed {
		t.Error("three addresses drove another out")
	}
	if w.open != 12 || w.guests.Len() != 12 {
		t.Errorf("%d open, %d guests", w.open, w.guests.Len())
	}
	for w.guests.Len() > 0 {
		w.guests.Front().Value.(*serverConn).Close()
	}
	if len(w.crowds) != 0 || len(w.by) != 0 {
		t.Errorf("left: %v, %v", w.crowds, w.by)
	}
}

func TestRefusesConnectionsWhereAllHaveCertificates(t *testing.T) {
	w := newConnWorld(100, 2)
	var held []*serverConn
	for range 2 {
		_, x := w.connect("2001:db8::1")
		w.certificate(x)
		held = append(held, x)
	}
	for range 5 { // another address of the same host's network
		if _, x := w.connect("2001:db8::2"); x != nil {
			t.Fatal("admitted")
		}
	}
	if n := w.count.all()["connection_refused/too_many"]; n != 5 {
		t.Errorf("counted %d", n)
	}
	if n := strings.Count(w.log.String(), "too many connections"); n != 1 {
		t.Errorf("%d lines:\n%s", n, w.log.String())
	}
	w.clock.add(fullEvery)
	w.connect("2001:db8::2")
	if n := strings.Count(w.log.String(), "too many connections"); n != 2 {
		t.Errorf("%d lines a minute later", n)
	}
	for _, x := range held {
		x.Close()
		x.Close() // counts once
	}
	if w.open != 0 || len(w.by) != 0 || w.guests.Len() != 0 {
		t.Errorf("%d open, %d addresses, %d guests after all are closed", w.open, len(w.by), w.guests.Len())
	}
	if _, x := w.connect("2001:db8::2"); x == nil {
		t.Error("refused though there is room")
	}
}

// With real connections: half-open handshakes without end, beside an agent.
func TestHalfOpenHandshakesKeepNobodyOut(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxConnectionsOfAddress = 4 })
	n := w.attest(w.newTPM(), attestOptions{})
	if err := n.sync(); err != nil {
		t.Fatal(err)
	}
	var first net.Conn
	for range 20 {
		c, err := net.Dial("tcp", w.srv.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if first == nil {
			first = c
		}
	}
	first.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := first.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the oldest is open still: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := bundlev1.NewBundleClient(w.dialTCP(nil)).GetBundle(ctx, &bundlev1.GetBundleRequest{}); err != nil {
		t.Errorf("a newcomer: %v", err)
	}
	if err := n.sync(); err != nil {
		t.Errorf("the agent: %v", err)
	}
	if w.srv.Counters()["connection_closed/made_room"] == 0 {
		t.Error("nothing is counted")
	}
}

// A certificate counts only once its key was shown: certificates are public.
func TestCertificateCountsAfterTheHandshake(t *testing.T) {
	w := newWorld(t, nil)
	l := w.srv.tcp.(*connListener)
	guests := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.guests.Len()
	}
	n := w.attest(w.newTPM(), attestOptions{})
	if err := n.sync(); err != nil {
		t.Fatal(err)
	}
	before := guests()
	other := forge.P256(t)
	stolen := *n.tlsCert()
	stolen.PrivateKey = other
	c, err := tls.Dial("tcp", w.srv.Addr().String(), &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &stolen, nil },
	})
	if err == nil {
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err = c.Read(make([]byte, 1)); err == nil {
			t.Fatal("a certificate without its key is accepted")
		}
	}
	if guests() < before-1 {
		t.Error("a stranger's connection counts as an agent's")
	}
}
