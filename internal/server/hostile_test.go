package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"log/slog"
	"math/big"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/boundcodec"
)

// Anybody may send a CSR, and one check of a signature by a key of 200,000 bits
// takes seconds.
func TestRefusesOversizedKeyInCSR(t *testing.T) {
	modulus := make([]byte, 25_000)
	rand.Read(modulus)
	modulus[0] |= 0x80
	modulus[len(modulus)-1] |= 1
	spki, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: 65537})
	if err != nil {
		t.Fatal(err)
	}
	type request struct {
		Version int
		Subject asn1.RawValue
		Key     asn1.RawValue
		Attrs   []asn1.RawValue `asn1:"tag:0"`
	}
	sha256WithRSA := pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, Parameters: asn1.NullRawValue}
	csr, err := asn1.Marshal(struct {
		Request   request
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		request{Subject: asn1.RawValue{FullBytes: []byte{0x30, 0}}, Key: asn1.RawValue{FullBytes: spki}},
		sha256WithRSA,
		asn1.BitString{Bytes: make([]byte, len(modulus)), BitLength: 8 * len(modulus)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseCSR(csr); err == nil || !strings.Contains(err.Error(), "RSA key of 200000 bits") {
		t.Fatalf("its signature was checked: %v", err)
	}
}

// A request is read before an interceptor sees its call, so whoever has no
// certificate is refused on the headers alone.
func TestRefusesUnauthenticatedCallBeforeReadingIt(t *testing.T) {
	w := newWorld(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := w.dialTCP(nil).NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/spire.api.server.svid.v1.SVID/BatchNewX509SVID")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(new(svidv1.BatchNewX509SVIDResponse)); status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
}

// The same from a method that is open to all.
func TestStalledRequestEnds(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.RoundTimeout = 50 * time.Millisecond })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := w.dialTCP(nil).NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/spire.api.server.bundle.v1.Bundle/GetBundle")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(new(types.Bundle)); err == nil || ctx.Err() != nil {
		t.Fatalf("it went on: %v", err)
	}
}

// Requests that are begun and never finished.
func TestRefusesTooManyOpenCalls(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	for _, c := range []struct {
		name, method string
		most         int
		conns        func() *grpc.ClientConn
	}{
		{"nobody", "/spire.api.server.bundle.v1.Bundle/GetBundle", maxCallsOfAddress, func() *grpc.ClientConn { return w.dialTCP(nil) }},
		{"agent", "/spire.api.server.svid.v1.SVID/BatchNewX509SVID", maxCallsOfAgent, func() *grpc.ClientConn { return n.conn }},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			open := func() <-chan error {
				stream, err := c.conns().NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, c.method)
				if err != nil {
					t.Fatal(err)
				}
				ended := make(chan error, 1)
				go func() { ended <- stream.RecvMsg(new(types.Bundle)) }()
				return ended
			}
			ended := make(chan error)
			for range c.most + 1 {
				one := open()
				go func() {
					select {
					case ended <- <-one:
					case <-t.Context().Done():
					}
				}()
			}
			if err := <-ended; status.Code(err) != codes.ResourceExhausted {
				t.Fatal(err)
			}
			cancel()
			// What has ended makes room again.
			for deadline := time.Now().Add(10 * time.Second); ; {
				_, err := bundlev1.NewBundleClient(c.conns()).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
				if err == nil {
					break
				}
				if status.Code(err) != codes.ResourceExhausted || time.Now().After(deadline) {
					t.Fatal(err)
				}
			}
		})
	}
}

type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(b []byte, v any) error { *v.(*[]byte) = slices.Clone(b); return nil }
func (rawCodec) Name() string                    { return "proto" }

// Two bytes of these become more than a hundred, sixty-four calls at once many
// gigabytes; and a request is decoded before its sender is looked at.
func TestRefusesRequestsThatGrow(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	for _, c := range []struct {
		method string
		field  byte
		conn   *grpc.ClientConn
	}{
		{"/spire.api.server.svid.v1.SVID/BatchNewX509SVID", 0x0a, n.conn},
		{"/spire.api.server.svid.v1.SVID/NewJWTSVID", 0x12, n.conn},
		{"/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries", 0x12, n.conn},
		{"/spire.api.server.entry.v1.Entry/BatchCreateEntry", 0x0a, n.conn}, // not even for agents
		{attestMethod, 0x0a, w.dialTCP(nil)},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		stream, err := c.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, c.method, grpc.ForceCodec(rawCodec{}))
		if err != nil {
			t.Fatal(err)
		}
		body := bytes.Repeat([]byte{c.field, 0}, (4<<20-64)/2)
		_ = stream.SendMsg(&body) // the reason comes from RecvMsg
		var resp []byte
		if err := stream.RecvMsg(&resp); !strings.Contains(status.Convert(err).Message(), boundcodec.ErrTooMany.Error()) {
			t.Errorf("%s: %v", c.method, err)
		}
		cancel()
	}
}

// An agent may ask for what it must not have as often as it likes, by any name:
// the log must not fill the disk.
func TestRefusesInFewLines(t *testing.T) {
	var log countedLines
	w := newWorld(t, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	n := w.attest(w.newTPM(), attestOptions{})
	key := newCSR(t, n.key, nil)
	before := w.srv.Counters()["log_line_left_out"]
	ask := func(id string, times int) {
		req := new(svidv1.BatchNewX509SVIDRequest)
		for range times {
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: key})
		}
		if _, err := svidv1.NewSVIDClient(n.conn).BatchNewX509SVID(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	ask(strings.Repeat("x", 1<<20), 1)
	if got := log.bytes.Load(); got > 64<<10 {
		t.Errorf("%d bytes for one refusal", got)
	}
	for range 10 {
		ask("x", 500)
	}
	if got := w.srv.Counters()["log_line_left_out"] - before; got < 2000 {
		t.Errorf("%d lines were left out of 5000", got)
	}
}

type countedLines struct{ bytes atomic.Int64 }

func (c *countedLines) Write(b []byte) (int, error) {
	c.bytes.Add(int64(len(b)))
	return len(b), nil
}
