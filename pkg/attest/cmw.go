package attest

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Media types of our two CMW records, and the conceptual message each holds
// (RFC 9999: evidence is bit 2, attestation results bit 3).
const (
	evidenceType      = "application/vnd.rootlink.evidence+cbor"
	evidenceIndicator = 4
	akType            = "application/vnd.rootlink.ak-statement+cbor"
	akIndicator       = 8
)

// maxCMW bounds the wrapper around the largest record.
const maxCMW = MaxEvidence + 128

// ExtensionID returns id-pe-cmw, 1.3.6.1.5.5.7.1.35 (RFC 9999): the extension
// that carries evidence in a CSR and in an SVID.
func ExtensionID() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 35} }

// cmwRecord is the cbor-record of a RATS Conceptual Message Wrapper.
type cmwRecord struct {
	_         struct{} `cbor:",toarray"`
	Type      string
	Value     []byte
	Indicator uint64
}

// Extension returns e as the non-critical id-pe-cmw extension (cbor choice).
func (e *Evidence) Extension() (pkix.Extension, error) {
	b, err := e.MarshalRecord()
	if err != nil {
		return pkix.Extension{}, err
	}
	return marshalCMW(evidenceType, evidenceIndicator, b)
}

// ParseExtensionValue decodes the DER value of an id-pe-cmw extension.
func ParseExtensionValue(der []byte) (*Evidence, error) {
	b, err := parseCMW(der, evidenceType, evidenceIndicator)
	if err != nil {
		return nil, err
	}
	return ParseRecord(b)
}

func marshalCMW(mediaType string, indicator uint64, record []byte) (pkix.Extension, error) {
	b, err := encode(cmwRecord{Type: mediaType, Value: record, Indicator: indicator}, maxCMW, ErrRecord)
	if err != nil {
		return pkix.Extension{}, err
	}
	der, err := asn1.Marshal(b) // []byte is an OCTET STRING: the cbor arm of the CHOICE
	if err != nil {
		return pkix.Extension{}, err
	}
	return pkix.Extension{Id: ExtensionID(), Value: der}, nil
}

// parseCMW unwraps one record of the wanted type. Whatever is not byte for byte
// what marshalCMW writes is refused, so one evidence has one encoding.
func parseCMW(der []byte, mediaType string, indicator uint64) ([]byte, error) {
	if len(der) > maxCMW {
		return nil, fmt.Errorf("%w: extension of %d bytes, at most %d", ErrRecord, len(der), maxCMW)
	}
	var b []byte
	if rest, err := asn1.Unmarshal(der, &b); err != nil {
		return nil, fmt.Errorf("%w: CMW is not the cbor choice: %v", ErrRecord, err)
	} else if len(rest) != 0 {
		return nil, fmt.Errorf("%w: bytes after the CMW", ErrRecord)
	}
	var rec cmwRecord
	if err := decode(b, &rec, maxCMW, ErrRecord); err != nil {
		return nil, err
	}
	if rec.Type != mediaType || rec.Indicator != indicator {
		return nil, fmt.Errorf("%w: CMW of type %.80q, indicator %d", ErrRecord, rec.Type, rec.Indicator)
	}
	if again, err := marshalCMW(rec.Type, rec.Indicator, rec.Value); err != nil || !bytes.Equal(again.Value, der) {
		return nil, fmt.Errorf("%w: CMW is not in deterministic encoding", ErrRecord)
	}
	return rec.Value, nil
}

// oneCMW returns the value of the one id-pe-cmw extension, nil when there is none.
func oneCMW(exts []pkix.Extension) ([]byte, error) {
	var value []byte
	for _, x := range exts {
		if !x.Id.Equal(ExtensionID()) {
			continue
		}
		if value != nil {
			return nil, fmt.Errorf("%w: two id-pe-cmw extensions", ErrRecord)
		}
		if x.Critical {
			return nil, fmt.Errorf("%w: id-pe-cmw is marked critical", ErrRecord)
		}
		if value = x.Value; value == nil {
			value = []byte{}
		}
	}
	return value, nil
}

// encode returns the deterministic encoding of a record, whose errors are
// malformed. The modes here and in decode are built per call: cheap beside a
// signature check, and the package keeps no global state.
func encode(record any, most int, malformed error) ([]byte, error) {
	mode, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, err
	}
	b, err := mode.Marshal(record)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", malformed, err)
	}
	if len(b) > most {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", malformed, len(b), most)
	}
	return b, nil
}

// decode reads b into record. It lets through what encode would not write, such
// as unsorted keys, long integers and null where a key should be absent: the
// caller encodes again what it understood, and compares.
func decode(b []byte, record any, most int, malformed error) error {
	if len(b) > most {
		return fmt.Errorf("%w: %d bytes, at most %d", malformed, len(b), most)
	}
	mode, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		UTF8:              cbor.UTF8RejectInvalid,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		MaxNestedLevels:   4,
		MaxArrayElements:  64,
		MaxMapPairs:       64,
	}.DecMode()
	if err != nil {
		return err
	}
	if err := mode.Unmarshal(b, record); err != nil {
		return fmt.Errorf("%w: %v", malformed, err)
	}
	return nil
}
