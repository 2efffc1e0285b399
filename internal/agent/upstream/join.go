package upstream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

// ErrTrustKey means that whoever answered could not prove to hold the trust key
// that the join line pins: another server, or somebody in between.
var ErrTrustKey = errors.New("server does not hold the trust key that the join line pins")

// JoinLine pins a trust domain's trust key:
// rootlink-join:v1:<trust domain>:<SHA-256 hex of the key's SPKI>.
type JoinLine struct {
	TrustDomain spiffeid.TrustDomain
	TrustKey    [32]byte
}

// ParseJoinLine is strict: one spelling for each line.
func ParseJoinLine(s string) (JoinLine, error) {
	var j JoinLine
	parts := strings.Split(s, ":")
	if len(parts) != 4 || parts[0] != "rootlink-join" {
		return j, errors.New("join line is not rootlink-join:v1:TRUST-DOMAIN:HASH")
	}
	if parts[1] != "v1" {
		return j, fmt.Errorf("join line has version %q, this agent knows v1", parts[1])
	}
	td, err := spiffeid.TrustDomainFromString(parts[2])
	if err != nil || td.Name() != parts[2] {
		return j, fmt.Errorf("join line has a malformed trust domain %q", parts[2])
	}
	h, err := hex.DecodeString(parts[3])
	if err != nil || len(h) != len(j.TrustKey) || hex.EncodeToString(h) != parts[3] {
		return j, errors.New("join line does not end in 64 lower-case hex digits")
	}
	j.TrustDomain = td
	copy(j.TrustKey[:], h)
	return j, nil
}

// Join is a Source that asks a server for its authorities over a connection it
// cannot verify yet, and believes only what the pinned trust key signed
// together with a nonce of ours.
type Join struct {
	Line   JoinLine
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
		return nil, errors.New("server knows no join lines (is it a stock SPIRE server?): use a trust bundle")
	}
	if err != nil {
		return nil, fmt.Errorf("ask for the signed bundle: %w", err)
	}
	sb, err := verifySignedBundle(resp, j.Line, nonce)
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

// verifySignedBundle checks, in this order: the key is the pinned one, the
// signature is its, the trust domain is ours, and the nonce is ours (else an
// old bundle could be replayed to revive an authority that was retired).
func verifySignedBundle(resp *nodev1.GetSignedBundleResponse, line JoinLine, nonce [32]byte) (*nodev1.SignedBundle, error) {
	got := sha256.Sum256(resp.GetTrustKey())
	if subtle.ConstantTimeCompare(got[:], line.TrustKey[:]) != 1 {
		return nil, ErrTrustKey
	}
	pub, err := x509.ParsePKIXPublicKey(resp.GetTrustKey())
	if err != nil {
		return nil, fmt.Errorf("trust key: %w", err)
	}
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("trust key is not ECDSA P-256")
	}
	digest := sha256.Sum256(append([]byte("rootlink/bundle/v1\x00"), resp.GetBundle()...))
	if !ecdsa.VerifyASN1(key, digest[:], resp.GetSignature()) {
		return nil, fmt.Errorf("%w: bad signature", ErrTrustKey)
	}
	sb := &nodev1.SignedBundle{}
	if err := proto.Unmarshal(resp.GetBundle(), sb); err != nil {
		return nil, fmt.Errorf("signed bundle: %w", err)
	}
	if sb.GetTrustDomain() != line.TrustDomain.Name() {
		return nil, fmt.Errorf("signed bundle is for trust domain %q, the join line is for %q", sb.GetTrustDomain(), line.TrustDomain)
	}
	if subtle.ConstantTimeCompare(sb.GetNonce(), nonce[:]) != 1 {
		return nil, fmt.Errorf("%w: the answer is not to our question (replayed?)", ErrTrustKey)
	}
	return sb, nil
}
