// Package join is how a machine that knows nothing but one line finds out whom
// to trust: the line pins a key of the trust domain, and that key signs today's
// authorities. Both sides of it are here, so that they cannot drift apart.
package join

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

// ErrTrustKey means that whoever answered could not prove to hold the trust key
// that the line pins: another server, or somebody in between.
var ErrTrustKey = errors.New("server does not hold the trust key that the join line pins")

// Names of the line's form, and what separates signatures over bundles from any
// other use of the trust key.
const (
	lineName     = "rootlink-join"
	lineVersion  = "v1"
	bundleDomain = "rootlink/bundle/v1\x00"
)

// Line pins a trust domain's trust key:
// rootlink-join:v1:<trust domain>:<SHA-256 hex of the key's SPKI>.
type Line struct {
	TrustDomain spiffeid.TrustDomain
	TrustKey    [32]byte
}

// NewLine returns the line that pins key.
func NewLine(td spiffeid.TrustDomain, key *ecdsa.PublicKey) (Line, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return Line{}, fmt.Errorf("trust key: %w", err)
	}
	return Line{TrustDomain: td, TrustKey: sha256.Sum256(spki)}, nil
}

func (l Line) String() string {
	return strings.Join([]string{lineName, lineVersion, l.TrustDomain.Name(), hex.EncodeToString(l.TrustKey[:])}, ":")
}

// Parse is strict: one spelling for each line.
func Parse(s string) (Line, error) {
	var l Line
	parts := strings.Split(s, ":")
	if len(parts) != 4 || parts[0] != lineName {
		return l, errors.New("join line is not rootlink-join:v1:TRUST-DOMAIN:HASH")
	}
	if parts[1] != lineVersion {
		return l, fmt.Errorf("join line has version %q, this agent knows %s", parts[1], lineVersion)
	}
	td, err := spiffeid.TrustDomainFromString(parts[2])
	if err != nil || td.Name() != parts[2] {
		return l, fmt.Errorf("join line has a malformed trust domain %q", parts[2])
	}
	h, err := hex.DecodeString(parts[3])
	if err != nil || len(h) != len(l.TrustKey) || hex.EncodeToString(h) != parts[3] {
		return l, errors.New("join line does not end in 64 lower-case hex digits")
	}
	return Line{TrustDomain: td, TrustKey: [32]byte(h)}, nil
}

func digest(bundle []byte) [32]byte {
	return sha256.Sum256(append([]byte(bundleDomain), bundle...))
}

// Sign signs b, which holds the caller's nonce, with the trust key.
func Sign(key *ecdsa.PrivateKey, b *nodev1.SignedBundle) (*nodev1.GetSignedBundleResponse, error) {
	raw, err := proto.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("trust key: %w", err)
	}
	sum := digest(raw)
	sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		return nil, fmt.Errorf("sign bundle: %w", err)
	}
	return &nodev1.GetSignedBundleResponse{Bundle: raw, TrustKey: spki, Signature: sig}, nil
}

// Verify checks, in this order: the key is the pinned one, the
// signature is its, the trust domain is ours, and the nonce is ours (else an
// old bundle could be replayed to revive an authority that was retired).
func Verify(resp *nodev1.GetSignedBundleResponse, line Line, nonce [32]byte) (*nodev1.SignedBundle, error) {
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
	sum := digest(resp.GetBundle())
	if !ecdsa.VerifyASN1(key, sum[:], resp.GetSignature()) {
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
