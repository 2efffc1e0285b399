package figures

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"sync"
	"sync/atomic"
	"time"
)

// PerSecond calls f from n goroutines for a while.
func PerSecond(d time.Duration, n int, f func(i int) error) (float64, error) {
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

// MintFloor checks these CSRs, one goroutine each, and signs certificates, and
// nothing else.
func MintFloor(csrs [][]byte) (float64, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, SubjectKeyId: []byte{1}}
	return PerSecond(time.Second, len(csrs), func(i int) error {
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
