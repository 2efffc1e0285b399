package tpm

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
)

// Info is what a TPM says of itself. Nothing of it is signed.
type Info struct {
	Manufacturer string // TPM_PT_MANUFACTURER as ASCII, e.g. "IFX", "IBM"
	VendorString string
	Firmware     string // four 16-bit parts, e.g. "7.85.4555.0"
	Software     bool   // see softwareTPM
	ResetCount   uint32
	RestartCount uint32
	Clock        uint64 // ms of power-on time, not of day
	Safe         bool   // false: the clock may have gone back after an unclean stop
	Banks        []string
	InLockout    bool
}

// properties do not change while a TPM runs.
type properties struct {
	manufacturer string
	vendor       string
	firmware     string
	nvBuffer     uint32
	curves       []tpm2.TPMECCCurve
}

// Info describes the TPM.
func (d *Device) Info(ctx context.Context) (*Info, error) {
	return do(ctx, d, "describe the TPM", (*state).info)
}

func (s *state) info() (*Info, error) {
	p, err := s.properties()
	if err != nil {
		return nil, err
	}
	clock, err := tpm2.ReadClock{}.Execute(s.conn)
	if err != nil {
		return nil, fmt.Errorf("clock: %w", err)
	}
	vars, err := s.property(tpm2.TPMPTPermanent)
	if err != nil {
		return nil, err
	}
	banks, err := s.banks()
	if err != nil {
		return nil, err
	}
	c := clock.CurrentTime.ClockInfo
	return &Info{
		Manufacturer: p.manufacturer, VendorString: p.vendor, Firmware: p.firmware,
		Software:   softwareTPM(p.manufacturer, p.vendor),
		ResetCount: c.ResetCount, RestartCount: c.RestartCount, Clock: c.Clock, Safe: bool(c.Safe),
		Banks:     banks,
		InLockout: vars&(1<<9) != 0, // TPMA_PERMANENT.inLockout
	}, nil
}

// softwareTPM recognises TPMs that no chip backs, by what they call themselves.
// It serves honest labels, not security: a TPM can claim any name, and the EK's
// chain decides whom to believe.
//
//	IBM "SW   TPM"              libtpms: swtpm, QEMU
//	MSFT                        Microsoft's reference code and Hyper-V
//	VMW, GOOG, AMZN             vTPMs of VMware, Google Cloud, AWS Nitro
func softwareTPM(manufacturer, vendor string) bool {
	switch manufacturer {
	case "IBM":
		return strings.HasPrefix(vendor, "SW")
	case "MSFT", "VMW", "GOOG", "AMZN":
		return true
	}
	return false
}

func (s *state) properties() (*properties, error) {
	if s.props != nil {
		return s.props, nil
	}
	get := func(pt tpm2.TPMPT) (v uint32, err error) { return s.property(pt) }
	var p properties
	var words [7]uint32
	for i, pt := range []tpm2.TPMPT{
		tpm2.TPMPTManufacturer,
		tpm2.TPMPTVendorString1, tpm2.TPMPTVendorString2, tpm2.TPMPTVendorString3, tpm2.TPMPTVendorString4,
		tpm2.TPMPTFirmwareVersion1, tpm2.TPMPTFirmwareVersion2,
	} {
		var err error
		if words[i], err = get(pt); err != nil {
			return nil, err
		}
	}
	p.manufacturer, p.vendor = ascii(words[0:1]), ascii(words[1:5])
	p.firmware = fmt.Sprintf("%d.%d.%d.%d", words[5]>>16, words[5]&0xffff, words[6]>>16, words[6]&0xffff)
	var err error
	if p.nvBuffer, err = get(tpm2.TPMPTNVBufferMax); err != nil {
		return nil, err
	}
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapECCCurves, PropertyCount: 64}.Execute(s.conn)
	if err != nil {
		return nil, fmt.Errorf("curves: %w", err)
	}
	curves, err := rsp.CapabilityData.Data.ECCCurves()
	if err != nil {
		return nil, fmt.Errorf("curves: %w", err)
	}
	p.curves = curves.ECCCurves
	s.props = &p
	return s.props, nil
}

func (p *properties) hasCurve(c tpm2.TPMECCCurve) bool { return slices.Contains(p.curves, c) }

func (s *state) property(pt tpm2.TPMPT) (uint32, error) {
	rsp, err := tpm2.GetCapability{
		Capability: tpm2.TPMCapTPMProperties, Property: uint32(pt), PropertyCount: 1,
	}.Execute(s.conn)
	if err != nil {
		return 0, fmt.Errorf("TPM property %#x: %w", uint32(pt), err)
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return 0, fmt.Errorf("TPM property %#x: %w", uint32(pt), err)
	}
	if len(list.TPMProperty) == 0 || list.TPMProperty[0].Property != pt {
		return 0, nil // a property the TPM does not have
	}
	return list.TPMProperty[0].Value, nil
}

// ascii joins words of four characters, without control characters: the strings
// end up in logs and terminals.
func ascii(words []uint32) string {
	var b []byte
	for _, w := range words {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return -1
		}
		return r
	}, string(b)))
}
