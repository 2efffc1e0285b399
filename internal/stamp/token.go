package stamp

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/http"
	"time"

	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// Timestamp asks one authority once for a token over the bundle's signature.
// A time outside of the SVID's validity is refused, for a bundle with such a
// token could never be verified.
func (c *Client) Timestamp(ctx context.Context, url string, b *link.Bundle) ([]byte, error) {
	raw, at, err := c.TimestampOf(ctx, url, b.Signature())
	if err != nil {
		return nil, err
	}
	if err := within(at, b.UnverifiedCertificate()); err != nil {
		return nil, err
	}
	return raw, nil
}

// within fails on a time outside of the SVID's validity: with it nothing could
// ever be verified.
func within(at time.Time, svid *x509.Certificate) error {
	if at.Before(svid.NotBefore) || at.After(svid.NotAfter) {
		return fmt.Errorf("%w: its time %s is outside the SVID's validity, %s to %s: somebody's clock is wrong", ErrAnswer,
			at.UTC().Format(time.RFC3339), svid.NotBefore.UTC().Format(time.RFC3339), svid.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// TimestampOf asks one authority once for a token over data. The answer is the
// DER of its TimeStampResp, which answers this request and is about this data,
// and the time in it.
func (c *Client) TimestampOf(ctx context.Context, url string, data []byte) ([]byte, time.Time, error) {
	nonce, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, time.Time{}, err
	}
	query, err := timestamp.Request(data, nonce)
	if err != nil {
		return nil, time.Time{}, err
	}
	raw, err := c.do(ctx, exchange{
		method: http.MethodPost, url: url, body: query, bodyType: timestamp.QueryType,
		acceptedType: timestamp.ReplyType, limit: timestamp.MaxToken,
	})
	if err != nil {
		return nil, time.Time{}, err
	}
	token, err := timestamp.Parse(raw)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	if err := token.Answers(data, nonce); err != nil {
		return nil, time.Time{}, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	return raw, token.UnverifiedTime(), nil
}

// signers tells the tokens of a bundle apart by who is said to have signed.
func signers(b *link.Bundle) (map[[32]byte]bool, error) {
	out := map[[32]byte]bool{}
	for _, raw := range b.Timestamps() {
		id, err := signerOf(raw)
		if err != nil {
			return nil, fmt.Errorf("a token in the bundle: %w", err)
		}
		out[id] = true
	}
	return out, nil
}

func signerOf(raw []byte) ([32]byte, error) {
	t, err := timestamp.Parse(raw)
	if err != nil {
		return [32]byte{}, err
	}
	return t.UnverifiedSigner(), nil
}
