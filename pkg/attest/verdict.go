package attest

import (
	"crypto/sha256"
	"encoding/binary"
)

// VerdictKey is what a PCR policy verdict may be cached under: any change of AK,
// boot, selection, values, hash or policy gives another key. The digest alone is
// not enough, since one digest under two selections means two things, and one
// boot's verdict must not outlive it: a reset raises the reset count, TPM2_Clear
// lowers it, and after an unclean shutdown the clock may go back.
func VerdictKey(ak *AK, q *Quote, p *PCRPolicy) [32]byte {
	b := []byte("rootlink/verdict/v1\x00")
	b = appendLP(b, ak.Name)
	b = binary.BigEndian.AppendUint32(b, q.ResetCount)
	b = binary.BigEndian.AppendUint32(b, q.RestartCount)
	if q.Safe {
		b = append(b, 1)
	} else {
		b = append(b, 0)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(q.Selection)))
	for _, s := range q.Selection {
		b = appendLP(b, s.Bank)
		b = binary.BigEndian.AppendUint32(b, uint32(len(s.Indices)))
		for _, i := range s.Indices {
			b = binary.BigEndian.AppendUint32(b, i)
		}
	}
	b = appendLP(b, q.DigestAlg)
	b = appendLP(b, q.Digest)
	d := p.Digest()
	return sha256.Sum256(append(b, d[:]...))
}
