package tpm

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/pkg/attest"
)

// maxQuoteTries bounds how often values and quote are taken anew because a PCR
// was extended between them. IMA extends PCR 10 at every new file, in bursts.
const maxQuoteTries = 16

// Quoted is a quote with the PCR values that its digest covers.
type Quoted struct {
	Attest    []byte // TPMS_ATTEST as the TPM returned it
	Signature []byte // TPMT_SIGNATURE
	PCRs      []attest.PCRBank
	AKName    []byte
	Boot      attest.BootCounters
}

// QuoteNode quotes for node attestation: over the server's nonce, the AK, the
// trust domain and the agent's CSR key (zero when the plugin interface hides it).
func (d *Device) QuoteNode(ctx context.Context, sel []attest.PCRSelection, nonce [32]byte, trustDomain string, agentKey [32]byte) (*Quoted, error) {
	return d.quote(ctx, sel, func(akName []byte) [32]byte {
		return attest.NodeExtraData(nonce, akName, trustDomain, agentKey)
	})
}

// Commitment is one quote over many leaves.
type Commitment struct {
	Quoted
	Tree *attest.Tree
}

// QuoteLeaves quotes one commitment to all leaves, in their order.
func (d *Device) QuoteLeaves(ctx context.Context, sel []attest.PCRSelection, leaves []*attest.Leaf) (*Commitment, error) {
	hashes := make([][32]byte, len(leaves))
	for i, l := range leaves {
		h, err := l.Hash()
		if err != nil {
			return nil, fmt.Errorf("leaf %d: %w", i, err)
		}
		hashes[i] = h
	}
	tree, err := attest.NewTree(hashes)
	if err != nil {
		return nil, err
	}
	q, err := d.quote(ctx, sel, func(akName []byte) [32]byte {
		return attest.QuoteExtraData(uint64(len(leaves)), tree.Root(), akName)
	})
	if err != nil {
		return nil, err
	}
	return &Commitment{Quoted: *q, Tree: tree}, nil
}

// quote must stay unexported: its callers decide what the TPM signs.
func (d *Device) quote(ctx context.Context, sel []attest.PCRSelection, extraData func(akName []byte) [32]byte) (*Quoted, error) {
	sel, err := normalize(sel)
	if err != nil {
		return nil, err
	}
	return do(ctx, d, "quote", func(s *state) (*Quoted, error) {
		if s.d.opts.QuoteLatency > 0 {
			select {
			case <-s.conn.ctx.Done():
				return nil, context.Cause(s.conn.ctx)
			case <-time.After(s.d.opts.QuoteLatency):
			}
		}
		return s.quote(sel, extraData)
	})
}

func (s *state) quote(sel []attest.PCRSelection, extraData func(akName []byte) [32]byte) (*Quoted, error) {
	in, err := toTPM(sel)
	if err != nil {
		return nil, err
	}
	for range maxQuoteTries {
		pcrs, err := s.readPCRs(sel)
		if err != nil {
			return nil, err
		}
		var rsp *tpm2.QuoteResponse
		var akName []byte
		err = s.withAK(func(f *akFile, h tpm2.TPMHandle) (err error) {
			akName = f.name
			extra := extraData(f.name)
			rsp, err = tpm2.Quote{
				SignHandle:     f.handle(h),
				QualifyingData: tpm2.TPM2BData{Buffer: extra[:]},
				InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
				PCRSelect:      in,
			}.Execute(s.conn)
			return err
		})
		if err != nil {
			return nil, err
		}
		steady, err := covers(rsp, sel, pcrs)
		if err != nil {
			return nil, err
		}
		if !steady {
			continue
		}
		att, err := rsp.Quoted.Contents()
		if err != nil {
			return nil, fmt.Errorf("TPMS_ATTEST: %w", err)
		}
		return &Quoted{
			Attest:    bytes.Clone(rsp.Quoted.Bytes()),
			Signature: tpm2.Marshal(rsp.Signature),
			PCRs:      pcrs,
			AKName:    akName,
			Boot:      attest.BootCounters{Reset: att.ClockInfo.ResetCount, Restart: att.ClockInfo.RestartCount},
		}, nil
	}
	return nil, ErrPCRsChanging
}

// covers reports whether the quote is over exactly these PCR values.
func covers(rsp *tpm2.QuoteResponse, sel []attest.PCRSelection, pcrs []attest.PCRBank) (bool, error) {
	att, err := rsp.Quoted.Contents()
	if err != nil {
		return false, fmt.Errorf("TPMS_ATTEST: %w", err)
	}
	q, err := att.Attested.Quote()
	if err != nil {
		return false, fmt.Errorf("TPMS_ATTEST: %w", err)
	}
	if err := sameSelection(q.PCRSelect, sel); err != nil {
		return false, err
	}
	alg, err := signatureHash(&rsp.Signature)
	if err != nil {
		return false, err
	}
	h := alg.New()
	for i, s := range sel {
		for _, n := range s.Indices {
			h.Write(pcrs[i].Values[n])
		}
	}
	return bytes.Equal(h.Sum(nil), q.PCRDigest.Buffer), nil
}

// signatureHash is the hash of the signing scheme, which is that of pcrDigest too.
func signatureHash(sig *tpm2.TPMTSignature) (crypto.Hash, error) {
	switch sig.SigAlg {
	case tpm2.TPMAlgECDSA:
		s, err := sig.Signature.ECDSA()
		if err != nil {
			return 0, err
		}
		return s.Hash.Hash()
	case tpm2.TPMAlgRSASSA:
		s, err := sig.Signature.RSASSA()
		if err != nil {
			return 0, err
		}
		return s.Hash.Hash()
	}
	return 0, fmt.Errorf("signature scheme %#x is not one of our AK's", uint16(sig.SigAlg))
}
