package upstream

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/join"
	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

// Join is a Source that asks a server for its authorities over a connection it
// cannot verify yet, and believes only what the pinned trust key signed
// together with a nonce of ours.
type Join struct {
	Line   join.Line
	Server string
	Now    func() time.Time
	dialer []grpc.DialOption // tests only
}

// Fingerprint is over the line: another line is other trust.
func (j *Join) Fingerprint() [32]byte {
	return sha256.Sum256(append([]byte("join\x00"+j.Line.TrustDomain.Name()+"\x00"), j.Line.TrustKey[:]...))
}

// maxClockSkew is how far the server's clock may be from ours, in either
// direction, before we say so.
const maxClockSkew = 2 * time.Minute

// Authorities fetches and verifies the signed bundle.
func (j *Join) Authorities(ctx context.Context) ([]*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	// The channel is not verified, and need not be: the reply is signed by the
	// pinned key over our nonce, and nothing secret is sent.
	creds := credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true})
	conn, err := grpc.NewClient(target(j.Server), append([]grpc.DialOption{grpc.WithTransportCredentials(creds)}, j.dialer...)...)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var nonce [32]byte
	rand.Read(nonce[:])
	resp, err := nodev1.NewNodeClient(conn).GetSignedBundle(ctx, &nodev1.GetSignedBundleRequest{Nonce: nonce[:]})
	if status.Code(err) == codes.Unimplemented {
		return nil, &callError{
			"ask for the signed bundle", "the server knows no join lines: it is a stock SPIRE server",
			"start the agent with --trust-bundle FILE in place of --join: `spire-server bundle show` prints that file", err,
		}
	}
	if status.Code(err) == codes.FailedPrecondition {
		return nil, &callError{
			"ask for the signed bundle", status.Convert(err).Message(),
			"start the agent with --trust-bundle FILE in place of --join: `rootlink-server bundle show` prints that file", err,
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ask for the signed bundle: %w", err)
	}
	sb, err := join.Verify(resp, j.Line, nonce)
	if err != nil {
		return nil, err
	}
	if skew := time.Unix(sb.GetIssuedUnix(), 0).Sub(j.Now()); skew.Abs() > maxClockSkew {
		return nil, &ClockError{Ours: j.Now(), Theirs: time.Unix(sb.GetIssuedUnix(), 0)}
	}
	var as []*x509.Certificate
	for _, der := range sb.GetX509Authorities() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("signed bundle: %w", err)
		}
		as = append(as, c)
	}
	if len(as) == 0 {
		return nil, errors.New("signed bundle holds no authority")
	}
	return as, nil
}
