package server

import (
	"crypto/x509"
	"log/slog"
	"path/filepath"
	"testing"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/rootlink/rootlink/internal/forge"
)

// BenchmarkMintX509SVID is issuance over the admin socket, eight callers.
func BenchmarkMintX509SVID(b *testing.B) {
	s, err := New(b.Context(), Config{
		TrustDomain: td, DataDir: filepath.Join(b.TempDir(), "data"), Listen: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(b.Context()) }()
	conn, err := grpc.NewClient("unix:"+s.AdminSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	id, _ := spiffeURL("spiffe://" + td + "/x")
	csr := newCSR(b, forge.P256(b), &x509.CertificateRequest{URIs: id})
	client := svidv1.NewSVIDClient(conn)
	b.SetParallelism(4) // times GOMAXPROCS
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := client.MintX509SVID(b.Context(), &svidv1.MintX509SVIDRequest{Csr: csr}); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "SVIDs/s")
}

// BenchmarkBatchNewX509SVID is issuance with leaf evidence, in batches as an
// agent sends them whose leaves share quotes.
func BenchmarkBatchNewX509SVID(b *testing.B) {
	_, n, step, _ := issuer(b, func(c *Config) { c.Log = slog.New(slog.DiscardHandler) })
	const batch = 100
	client := svidv1.NewSVIDClient(n.conn)
	for done := 0; done < b.N; done += batch {
		b.StopTimer()
		req := new(svidv1.BatchNewX509SVIDRequest)
		for range batch {
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: step, Csr: n.csr(n.step("/build"))})
		}
		b.StartTimer()
		resp, err := client.BatchNewX509SVID(b.Context(), req)
		if err != nil {
			b.Fatal(err)
		}
		for _, r := range resp.Results {
			if r.Status.Code != 0 {
				b.Fatal(r.Status)
			}
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "SVIDs/s")
}
