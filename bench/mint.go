package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
)

const (
	mintCallers = 8
	mintTime    = 3 * time.Second
)

// minting: MintX509SVID over the admin socket, eight callers, as fast as the
// server goes; beside it the cryptography that it cannot leave out.
func minting(ctx context.Context, b *bench) error {
	var csrs [mintCallers][]byte
	for i := range csrs {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		u := &url.URL{Scheme: "spiffe", Host: trustDomain, Path: fmt.Sprintf("/mint/%d", i)}
		if csrs[i], err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, key); err != nil {
			return err
		}
	}
	client := svidv1.NewSVIDClient(b.admin)
	rates, floors := []float64{}, []float64{}
	var waits samples
	for range b.runs {
		var mu sync.Mutex
		r, err := perSecond(mintTime, mintCallers, func(i int) error {
			start := time.Now()
			_, err := client.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csrs[i]})
			mu.Lock()
			waits = append(waits, time.Since(start))
			mu.Unlock()
			return err
		})
		if err != nil {
			return err
		}
		f, err := mintFloor(csrs[:])
		if err != nil {
			return err
		}
		rates, floors = append(rates, r), append(floors, f)
	}
	b.out.line("MintX509SVID, 8 callers", fmt.Sprintf("%.0f/s (p99 %s)", middle(rates), short(waits.at(0.99))), "",
		fmt.Sprintf("checking such CSRs and signing, without a server, all cores: %.0f/s", middle(floors)))
	return nil
}

// perSecond calls f from n goroutines for a while.
func perSecond(d time.Duration, n int, f func(i int) error) (float64, error) {
	var done atomic.Int64
	var mu sync.Mutex
	var first error
	var wg sync.WaitGroup
	start := time.Now()
	for i := range n {
		wg.Go(func() {
			for time.Since(start) < d {
				if err := f(i); err != nil {
					mu.Lock()
					first = err
					mu.Unlock()
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(done.Load()) / time.Since(start).Seconds(), first
}

// mintFloor checks CSRs and signs certificates, and nothing else.
func mintFloor(csrs [][]byte) (float64, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, SubjectKeyId: []byte{1}}
	return perSecond(time.Second, mintCallers, func(i int) error {
		csr, err := x509.ParseCertificateRequest(csrs[i])
		if err == nil {
			err = csr.CheckSignature()
		}
		if err != nil {
			return err
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, URIs: csr.URIs,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		_, err = x509.CreateCertificate(rand.Reader, tmpl, ca, csr.PublicKey, key)
		return err
	})
}
