package nodeserver

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/pkg/attest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// selectors returns the node's selector values (docs/plugin-tpmnode.md).
func selectors(a *Attested, pcrs []attest.PCRSelection, v *policy.Verdict) []string {
	out := []string{"ek:" + hex.EncodeToString(a.EK.Hash[:]), "ek_basis:" + a.EK.Basis}
	if a.EK.Basis == attest.BasisMaker {
		out = append(out, "ek_root:"+hex.EncodeToString(a.EK.RootHash[:]))
	}
	for _, s := range pcrs {
		i := slices.IndexFunc(a.PCRs, func(b attest.PCRBank) bool { return b.Bank == s.Bank })
		if i < 0 {
			continue // cannot be: the quote was required to cover them
		}
		for _, n := range s.Indices {
			out = append(out, fmt.Sprintf("pcr:%s:%d:%s", s.Bank, n, hex.EncodeToString(a.PCRs[i].Values[n])))
		}
	}
	if a.SecureBoot != nil {
		out = append(out, "secure_boot:"+strconv.FormatBool(*a.SecureBoot))
	}
	return append(out, v.Selectors()...)
}

// label completes an AK with what is said of its TPM. It decides nothing: it
// makes honest TPMs readable and virtual ones visible. The maker's word in the
// EK certificate comes before what the agent reports, and the firmware version
// is that of the quote, which the TPM signed. A certificate that led to no
// maker's root is the node's word and no more: anybody can write one.
func label(ak *attest.AK, basis string, r *tpmv1.AttestRequest, firmware uint64) {
	maker, model := ekSubject(r.EkChain)
	if basis == attest.BasisMaker {
		ak.Manufacturer = plain(maker)
	}
	if ak.Manufacturer == "" && r.TpmManufacturer != "" {
		ak.Manufacturer = plain(r.TpmManufacturer)
		ak.Manufacturer = ak.Manufacturer[:min(len(ak.Manufacturer), 32)] + " (says the node)"
	}
	ak.Firmware = fmt.Sprintf("%d.%d.%d.%d", firmware>>48, firmware>>32&0xffff, firmware>>16&0xffff, firmware&0xffff)
	// Any sign of a virtual TPM makes it one.
	ak.Software = virtual(maker, model) || virtual(r.TpmManufacturer, r.TpmVendor)
}

// virtual recognises TPMs that no chip backs by what they call themselves.
func virtual(maker, model string) bool {
	switch strings.ToUpper(maker) {
	case "IBM": // libtpms and IBM's simulator; IBM has made chips too
		m := strings.ToLower(model)
		return strings.HasPrefix(m, "sw") || strings.Contains(m, "tpm2sim") || strings.Contains(m, "tpm simulator")
	case "MSFT", "VMW", "GOOG", "AMZN":
		return true
	}
	return strings.Contains(strings.ToLower(model), "swtpm")
}

// Attributes of the directoryName in an EK certificate's SAN (TCG EK Credential
// Profile 2.6, 3.2.9).
var (
	oidSAN             = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidTPMManufacturer = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidTPMModel        = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
)

// ekSubject reads manufacturer and model out of an EK certificate, "" where it
// does not name them.
func ekSubject(chain [][]byte) (maker, model string) {
	if len(chain) == 0 {
		return "", ""
	}
	c, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return "", ""
	}
	for _, x := range c.Extensions {
		if !x.Id.Equal(oidSAN) {
			continue
		}
		var names []asn1.RawValue
		if _, err := asn1.Unmarshal(x.Value, &names); err != nil {
			return "", ""
		}
		for _, n := range names {
			var rdns pkix.RDNSequence
			if n.Class != asn1.ClassContextSpecific || n.Tag != 4 {
				continue
			}
			if _, err := asn1.Unmarshal(n.Bytes, &rdns); err != nil {
				continue
			}
			for _, set := range rdns {
				for _, a := range set {
					text, _ := a.Value.(string)
					switch {
					case a.Type.Equal(oidTPMManufacturer):
						maker = vendorID(text)
					case a.Type.Equal(oidTPMModel):
						model = text
					}
				}
			}
		}
	}
	return maker, model
}

// vendorID turns "id:49465800" into "IFX", as TCG's registry of vendors has it.
// swtpm writes its number as an integer, "id:00001014", which is IBM's.
func vendorID(s string) string {
	digits, ok := strings.CutPrefix(s, "id:")
	if !ok {
		return s
	}
	if digits == "00001014" {
		return "IBM"
	}
	b, err := hex.DecodeString(digits)
	if err != nil {
		return s
	}
	return strings.TrimRight(string(b), "\x00 ")
}

// plain drops what is not printable ASCII and bounds the rest.
func plain(s string) string {
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return -1
		}
		return r
	}, s))
	return s[:min(len(s), 64)]
}
