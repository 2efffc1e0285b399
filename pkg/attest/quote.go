package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// Reasons why a quote is refused.
var (
	ErrQuoteMagic     = errors.New("not made by a TPM: TPM_GENERATED_VALUE is missing")
	ErrQuoteType      = errors.New("attestation is not a quote")
	ErrQuoteSignature = errors.New("signature does not verify")
	ErrQuoteExtraData = errors.New("quote is bound to something else")
	ErrQuoteSelection = errors.New("quote does not cover the required PCRs")
	ErrQuoteValues    = errors.New("PCR values are not those that were quoted")
)

// Quote is the part of a checked TPMS_ATTEST that policies look at.
type Quote struct {
	ResetCount      uint32
	RestartCount    uint32
	Clock           uint64 // ms
	Safe            bool
	FirmwareVersion uint64
	Selection       []PCRSelection
	DigestAlg       string
	Digest          []byte // as recomputed from the values
	ExtraData       []byte
}

// VerifyQuote checks magic, type, exact length, signature, extraData, that the
// selection covers required, and that the digest is that of the values, which
// must be exactly the selected ones.
func VerifyQuote(attest, signature []byte, ak *AK, extraData [32]byte, pcrs []PCRBank, required []PCRSelection) (*Quote, error) {
	q, err := parseQuote(attest)
	if err != nil {
		return nil, err
	}
	if err := q.verifySignature(attest, signature, ak); err != nil {
		return nil, err
	}
	if !bytes.Equal(q.ExtraData, extraData[:]) {
		return nil, ErrQuoteExtraData
	}
	if err := q.checkSelection(required); err != nil {
		return nil, err
	}
	if err := q.checkValues(pcrs); err != nil {
		return nil, err
	}
	return &q.Quote, nil
}

// quote is a decoded quote between the steps of its verification.
type quote struct {
	Quote
	pcrDigest []byte
	hash      tpmHash // of the signature, and so of the digest
}

// decodeAttest decodes a TPMS_ATTEST and checks the magic. A restricted key
// signs nothing that starts with it but what its TPM made itself.
func decodeAttest(b []byte) (*tpm2.TPMSAttest, error) {
	// In the bytes, because the library decodes whatever stands there.
	if len(b) >= 4 && !bytes.Equal(b[:4], []byte{0xff, 'T', 'C', 'G'}) {
		return nil, ErrQuoteMagic
	}
	return decodeTPM[tpm2.TPMSAttest]("TPMS_ATTEST", b)
}

func parseQuote(attest []byte) (*quote, error) {
	a, err := decodeAttest(attest)
	if err != nil {
		return nil, err
	}
	if a.Type != tpm2.TPMSTAttestQuote {
		return nil, fmt.Errorf("%w but of type %#x", ErrQuoteType, uint16(a.Type))
	}
	info, err := a.Attested.Quote()
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrQuoteType, err)
	}
	q := &quote{pcrDigest: info.PCRDigest.Buffer}
	q.ResetCount, q.RestartCount = a.ClockInfo.ResetCount, a.ClockInfo.RestartCount
	q.Clock, q.Safe = a.ClockInfo.Clock, bool(a.ClockInfo.Safe)
	q.FirmwareVersion = a.FirmwareVersion
	q.ExtraData = a.ExtraData.Buffer
	q.Selection, err = parseSelection(info.PCRSelect.PCRSelections)
	return q, err
}

// parseSelection keeps the banks of which PCRs were really selected, in the
// order of the quote: the TPM empties the selection of a disabled bank and
// signs all the same.
func parseSelection(in []tpm2.TPMSPCRSelection) ([]PCRSelection, error) {
	if len(in) > 16 { // HASH_COUNT of any TPM is far below
		return nil, fmt.Errorf("%w: %d banks", ErrQuoteSelection, len(in))
	}
	var out []PCRSelection
	for _, s := range in {
		sel := PCRSelection{}
		for i := range len(s.PCRSelect) * 8 {
			if s.PCRSelect[i/8]>>(i%8)&1 == 0 {
				continue
			}
			if i > MaxPCR {
				return nil, fmt.Errorf("%w: PCR %d", ErrQuoteSelection, i)
			}
			sel.Indices = append(sel.Indices, uint32(i))
		}
		if len(sel.Indices) == 0 {
			continue
		}
		h, ok := hashByID(uint64(s.Hash))
		if !ok {
			return nil, fmt.Errorf("%w: unknown bank %#x", ErrQuoteSelection, uint16(s.Hash))
		}
		sel.Bank = h.name
		if slices.ContainsFunc(out, func(o PCRSelection) bool { return o.Bank == h.name }) {
			return nil, fmt.Errorf("%w: bank %s twice", ErrQuoteSelection, h.name)
		}
		out = append(out, sel)
	}
	return out, nil
}

func (q *quote) verifySignature(attest, signature []byte, ak *AK) (err error) {
	q.hash, err = verifySignature(ak.Public, attest, signature)
	return err
}

// verifySignature checks a TPMT_SIGNATURE over message and returns its hash.
func verifySignature(key crypto.PublicKey, message, signature []byte) (tpmHash, error) {
	s, err := decodeTPM[tpm2.TPMTSignature]("TPMT_SIGNATURE", signature)
	if err != nil {
		return tpmHash{}, err
	}
	strong := func(alg tpm2.TPMAlgID) (tpmHash, error) {
		h, ok := hashByID(uint64(alg))
		if !ok || h.weak {
			return h, fmt.Errorf("%w: hash %#x is not taken", ErrQuoteSignature, uint16(alg))
		}
		return h, nil
	}
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		sig, err := s.Signature.ECDSA()
		if err != nil {
			return tpmHash{}, fmt.Errorf("%w: %v", ErrQuoteSignature, err)
		}
		h, err := strong(sig.Hash)
		if err != nil {
			return h, err
		}
		r := new(big.Int).SetBytes(sig.SignatureR.Buffer)
		t := new(big.Int).SetBytes(sig.SignatureS.Buffer)
		if !ecdsa.Verify(k, h.sum(message), r, t) {
			return h, ErrQuoteSignature
		}
		return h, nil
	case *rsa.PublicKey:
		if sig, err := s.Signature.RSASSA(); err == nil {
			h, err := strong(sig.Hash)
			if err != nil {
				return h, err
			}
			if rsa.VerifyPKCS1v15(k, h.hash, h.sum(message), sig.Sig.Buffer) != nil {
				return h, ErrQuoteSignature
			}
			return h, nil
		}
		sig, err := s.Signature.RSAPSS()
		if err != nil {
			return tpmHash{}, fmt.Errorf("%w: algorithm %#x", ErrQuoteSignature, uint16(s.SigAlg))
		}
		h, err := strong(sig.Hash)
		if err != nil {
			return h, err
		}
		if rsa.VerifyPSS(k, h.hash, h.sum(message), sig.Sig.Buffer, nil) != nil {
			return h, ErrQuoteSignature
		}
		return h, nil
	}
	return tpmHash{}, fmt.Errorf("%w: key of type %T", ErrQuoteSignature, key)
}

// checkSelection fails unless every required PCR was quoted in its bank, and at
// least one was required.
func (q *quote) checkSelection(required []PCRSelection) error {
	if len(q.Selection) == 0 {
		return fmt.Errorf("%w: the selection is empty", ErrQuoteSelection)
	}
	n := 0
	for _, want := range required {
		h, ok := hashByName(want.Bank)
		if !ok || h.weak {
			return fmt.Errorf("%w: bank %.20q proves nothing", ErrQuoteSelection, want.Bank)
		}
		i := slices.IndexFunc(q.Selection, func(s PCRSelection) bool { return s.Bank == want.Bank })
		for _, pcr := range want.Indices {
			if ResettablePCR(pcr) {
				return fmt.Errorf("%w: PCR %d can be reset by anyone", ErrQuoteSelection, pcr)
			}
			if i < 0 || !slices.Contains(q.Selection[i].Indices, pcr) {
				return fmt.Errorf("%w: %s:%d is missing", ErrQuoteSelection, want.Bank, pcr)
			}
			n++
		}
	}
	if n == 0 {
		return fmt.Errorf("%w: none is required", ErrQuoteSelection)
	}
	return nil
}

// checkValues fails unless the values are exactly those selected and hash to
// the quoted digest (Part 3 §18.4: in the order of the selection, each bank's
// PCRs ascending, under the hash of the signature).
func (q *quote) checkValues(pcrs []PCRBank) error {
	if err := checkBanks(pcrs); err != nil {
		return fmt.Errorf("%w: %w", ErrQuoteValues, err)
	}
	if len(pcrs) != len(q.Selection) {
		return fmt.Errorf("%w: %d banks, %d quoted", ErrQuoteValues, len(pcrs), len(q.Selection))
	}
	d := q.hash.new()
	for _, s := range q.Selection {
		i := slices.IndexFunc(pcrs, func(b PCRBank) bool { return b.Bank == s.Bank })
		if i < 0 || len(pcrs[i].Values) != len(s.Indices) {
			return fmt.Errorf("%w: bank %s", ErrQuoteValues, s.Bank)
		}
		for _, pcr := range s.Indices {
			v, ok := pcrs[i].Values[pcr]
			if !ok {
				return fmt.Errorf("%w: %s:%d has no value", ErrQuoteValues, s.Bank, pcr)
			}
			d.Write(v)
		}
	}
	q.Digest, q.DigestAlg = d.Sum(nil), q.hash.name
	if !bytes.Equal(q.Digest, q.pcrDigest) {
		return fmt.Errorf("%w: digest differs", ErrQuoteValues)
	}
	return nil
}
