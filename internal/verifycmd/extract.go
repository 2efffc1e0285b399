package verifycmd

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

// part is one file that extract writes.
type part struct {
	name string
	data []byte
}

func (in *inspected) extract(cmd *cobra.Command, dir string) error {
	parts, err := in.parts()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, p := range parts {
		if err := files.Write(filepath.Join(dir, p.name), p.data, 0o644); err != nil {
			return err
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "wrote %s\n", filepath.Join(dir, p.name))
	}
	return nil
}

func (in *inspected) parts() ([]part, error) {
	var parts []part
	if in.cert != nil {
		parts = append(parts, part{"svid.pem", toPEM("CERTIFICATE", in.cert.Raw)})
	}
	if in.detached != nil {
		var chain []byte
		for _, der := range in.detached.AgentSVID {
			chain = append(chain, toPEM("CERTIFICATE", der)...)
		}
		parts = append(parts, part{"agent-svid.pem", chain})
	}
	if in.bundle != nil {
		parts = append(parts, part{"statement.json", in.bundle.UnverifiedPayload()})
	}
	if in.evidence == nil {
		return parts, nil
	}
	e := in.evidence
	record, err := e.MarshalRecord()
	if err != nil {
		return nil, err
	}
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Attest)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	pcrs, err := pcrFile(a, e.PCRs)
	if err != nil {
		return nil, err
	}
	parts = append(parts,
		part{"evidence.cbor", record},
		part{"quote.msg", e.Attest},
		part{"quote.sig", e.Signature},
		part{"pcrs.out", pcrs},
		part{"extradata.hex", []byte(hex.EncodeToString(a.ExtraData.Buffer) + "\n")},
		part{"nonce.hex", []byte(hex.EncodeToString(e.Nonce[:]) + "\n")},
		part{"ak-cert.pem", toPEM("CERTIFICATE", e.AKCert)},
	)
	ak, err := x509.ParseCertificate(e.AKCert)
	if err != nil {
		return nil, fmt.Errorf("AK certificate: %w", err)
	}
	parts = append(parts, part{"ak.pem", toPEM("PUBLIC KEY", ak.RawSubjectPublicKeyInfo)})
	if len(e.EKChain) == 0 {
		return append(parts, part{"ek.pem", toPEM("PUBLIC KEY", e.EKPublic)}), nil
	}
	ek, err := x509.ParseCertificate(e.EKChain[0])
	if err != nil {
		return nil, fmt.Errorf("EK certificate: %w", err)
	}
	var chain []byte
	for _, der := range e.EKChain {
		chain = append(chain, toPEM("CERTIFICATE", der)...)
	}
	return append(parts, part{"ek.pem", toPEM("PUBLIC KEY", ek.RawSubjectPublicKeyInfo)}, part{"ek-cert.pem", chain}), nil
}

func toPEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// Sizes of the C structures that tpm2-tools writes to disk as they are in
// memory: TPML_PCR_SELECTION has 16 selections of 4 octets, TPML_DIGEST has 8
// digests of at most 64 bytes.
const (
	maxSelections  = 16
	selectOctets   = 4
	digestsPerList = 8
	maxDigest      = 64
)

// pcrFile is what tpm2_checkquote -f reads: the selection and the values in
// its order, as the "serialized" output of tpm2_quote --pcr, little-endian.
func pcrFile(a *tpm2.TPMSAttest, banks []attest.PCRBank) ([]byte, error) {
	q, err := a.Attested.Quote()
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	selections := q.PCRSelect.PCRSelections
	if len(selections) > maxSelections {
		return nil, errors.New("quote: too many PCR banks")
	}
	le := binary.LittleEndian
	var out bytes.Buffer
	var values [][]byte
	out.Write(le.AppendUint32(nil, uint32(len(selections))))
	for _, s := range selections {
		if len(s.PCRSelect) > selectOctets {
			return nil, errors.New("quote: too many PCRs")
		}
		entry := make([]byte, 2+1+selectOctets+1) // and one of padding
		le.PutUint16(entry, uint16(s.Hash))
		entry[2] = byte(len(s.PCRSelect))
		copy(entry[3:], s.PCRSelect)
		out.Write(entry)
		bank := slices.IndexFunc(banks, func(b attest.PCRBank) bool { return b.Bank == bankName(s.Hash) })
		for i := range uint32(8 * len(s.PCRSelect)) {
			if s.PCRSelect[i/8]&(1<<(i%8)) == 0 {
				continue
			}
			if bank < 0 || len(banks[bank].Values[i]) == 0 || len(banks[bank].Values[i]) > maxDigest {
				return nil, fmt.Errorf("quote: no value for PCR %d of bank 0x%04x", i, uint16(s.Hash))
			}
			values = append(values, banks[bank].Values[i])
		}
	}
	out.Write(make([]byte, (maxSelections-len(selections))*(2+1+selectOctets+1)))
	lists := slices.Collect(slices.Chunk(values, digestsPerList))
	out.Write(le.AppendUint32(nil, uint32(len(lists))))
	for _, list := range lists {
		out.Write(le.AppendUint32(nil, uint32(len(list))))
		for i := range digestsPerList {
			entry := make([]byte, 2+maxDigest)
			if i < len(list) {
				le.PutUint16(entry, uint16(len(list[i])))
				copy(entry[2:], list[i])
			}
			out.Write(entry)
		}
	}
	return out.Bytes(), nil
}

func bankName(alg tpm2.TPMIAlgHash) string {
	switch alg {
	case tpm2.TPMAlgSHA1:
		return "sha1"
	case tpm2.TPMAlgSHA256:
		return "sha256"
	case tpm2.TPMAlgSHA384:
		return "sha384"
	case tpm2.TPMAlgSHA512:
		return "sha512"
	}
	return ""
}
