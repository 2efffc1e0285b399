package attest_test

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strconv"
	"testing"

	logs "github.com/google/go-eventlog/testdata"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Real logs, from go-eventlog's test data; the PCR values of the same machines
// (testdata/eventlog/pcrs.json) come from its tests.
func realLogs() map[string][]byte {
	return map[string][]byte{
		"Rhel8":                  logs.Rhel8EventLog,
		"Ubuntu1804AmdSev":       logs.Ubuntu1804AmdSevEventLog,
		"Ubuntu2104NoDbx":        logs.Ubuntu2104NoDbxEventLog,
		"Ubuntu2104NoSecureBoot": logs.Ubuntu2104NoSecureBootEventLog,
		"Ubuntu2404AmdSevSnp":    logs.Ubuntu2404AmdSevSnpEventLog,
		"GlinuxAlex":             logs.GlinuxAlexEventLog,
		"ArchLinuxWorkstation":   logs.ArchLinuxWorkstationEventLog,
		"Debian10":               logs.Debian10EventLog,
		"Cos85AmdSev":            logs.Cos85AmdSevEventLog,
		"Cos93AmdSev":            logs.Cos93AmdSevEventLog,
		"Cos101AmdSev":           logs.Cos101AmdSevEventLog,
	}
}

func realPCRs(t testing.TB, name string) []attest.PCRBank {
	t.Helper()
	b, err := os.ReadFile("testdata/eventlog/pcrs.json")
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]map[string]map[string]string
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	var out []attest.PCRBank
	for _, bank := range []string{"sha256", "sha384"} {
		if len(all[name][bank]) == 0 {
			continue
		}
		v := map[uint32][]byte{}
		for i, h := range all[name][bank] {
			n, err := strconv.Atoi(i)
			if err != nil {
				t.Fatal(err)
			}
			if v[uint32(n)], err = hex.DecodeString(h); err != nil {
				t.Fatal(err)
			}
		}
		out = append(out, attest.PCRBank{Bank: bank, Values: v})
	}
	return out
}

func TestReplayRealLogs(t *testing.T) {
	yes, no := true, false
	for name, want := range map[string]*bool{
		"Rhel8": &yes, "Cos85AmdSev": &yes, "Cos93AmdSev": &yes, "Cos101AmdSev": &yes,
		"Ubuntu1804AmdSev": &no, "Ubuntu2104NoDbx": &no, "Ubuntu2104NoSecureBoot": &no, "Ubuntu2404AmdSevSnp": &no,
		// Their firmware logs an empty SecureBoot variable, or none.
		"GlinuxAlex": nil, "ArchLinuxWorkstation": nil,
	} {
		c, err := attest.ReplayEventLog(realLogs()[name], realPCRs(t, name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if c.Bank != "sha256" || len(c.Replayed) < 8 {
			t.Errorf("%s: replayed %v of %s", name, c.Replayed, c.Bank)
		}
		if (c.SecureBoot == nil) != (want == nil) || want != nil && *c.SecureBoot != *want {
			t.Errorf("%s: Secure Boot %v, want %v", name, c.SecureBoot, want)
		}
	}
}

// event is one entry of a crypto-agile log.
type event struct {
	pcr, typ uint32
	digests  map[uint16][]byte
	order    []uint16
	data     []byte
}

const (
	evNoAction     = 0x3
	evSeparator    = 0x4
	evIPL          = 0xd
	evDriverConfig = 0x80000001
	evAuthority    = 0x800000e0
	algSHA1        = 0x4
	algSHA256      = 0xb
	algSHA384      = 0xc
)

// splitLog takes a log apart: its first event as it is, then the others.
func splitLog(t testing.TB, log []byte) (head []byte, events []event) {
	t.Helper()
	le := binary.LittleEndian
	n := 32 + int(le.Uint32(log[28:]))
	head, log = log[:n], log[n:]
	sizes := map[uint16]int{algSHA1: 20, algSHA256: 32, algSHA384: 48}
	for len(log) > 0 {
		e := event{pcr: le.Uint32(log), typ: le.Uint32(log[4:]), digests: map[uint16][]byte{}}
		count := int(le.Uint32(log[8:]))
		log = log[12:]
		for range count {
			alg := le.Uint16(log)
			e.order = append(e.order, alg)
			e.digests[alg] = bytes.Clone(log[2 : 2+sizes[alg]])
			log = log[2+sizes[alg]:]
		}
		size := int(le.Uint32(log))
		e.data = bytes.Clone(log[4 : 4+size])
		log = log[4+size:]
		events = append(events, e)
	}
	return head, events
}

func joinLog(head []byte, events []event) []byte {
	le := binary.LittleEndian
	out := bytes.Clone(head)
	for _, e := range events {
		out = le.AppendUint32(le.AppendUint32(out, e.pcr), e.typ)
		out = le.AppendUint32(out, uint32(len(e.order)))
		for _, alg := range e.order {
			out = append(le.AppendUint16(out, alg), e.digests[alg]...)
		}
		out = append(le.AppendUint32(out, uint32(len(e.data))), e.data...)
	}
	return out
}

// measure makes an event as firmware would, with digests of its data.
func measure(pcr, typ uint32, data []byte) event {
	e := event{pcr: pcr, typ: typ, data: data, order: []uint16{algSHA1, algSHA256, algSHA384}, digests: map[uint16][]byte{}}
	for alg, h := range map[uint16]crypto.Hash{algSHA1: crypto.SHA1, algSHA256: crypto.SHA256, algSHA384: crypto.SHA384} {
		d := h.New()
		d.Write(data)
		e.digests[alg] = d.Sum(nil)
	}
	return e
}

// replayed gives the PCRs the values that the events add up to.
func replayed(events []event) []attest.PCRBank {
	v := map[uint32][]byte{}
	for i := range uint32(8) {
		v[i] = make([]byte, 32)
	}
	for _, e := range events {
		if e.typ == evNoAction || e.pcr > 7 {
			continue
		}
		h := crypto.SHA256.New()
		h.Write(v[e.pcr])
		h.Write(e.digests[algSHA256])
		v[e.pcr] = h.Sum(nil)
	}
	return []attest.PCRBank{{Bank: "sha256", Values: v}}
}

// rhel8 is a log with Secure Boot on, of which the tests below bend copies.
func rhel8(t *testing.T) (head []byte, events []event) {
	t.Helper()
	head, events = splitLog(t, logs.Rhel8EventLog)
	if !bytes.Equal(joinLog(head, events), logs.Rhel8EventLog) {
		t.Fatal("the test does not write logs as it reads them")
	}
	c, err := attest.ReplayEventLog(logs.Rhel8EventLog, replayed(events))
	if err != nil || c.SecureBoot == nil || !*c.SecureBoot {
		t.Fatalf("the log as it is: %v, %v", c, err)
	}
	return head, events
}

func TestRefusesEventLogWithEventsDropped(t *testing.T) {
	head, events := rhel8(t)
	pcrs := realPCRs(t, "Rhel8")
	for pcr := range uint32(8) {
		var kept []event
		for _, e := range events {
			if e.pcr != pcr {
				kept = append(kept, e)
			}
		}
		// The library passes this one.
		if c, err := attest.ReplayEventLog(joinLog(head, kept), pcrs); !errors.Is(err, attest.ErrEventLog) {
			t.Errorf("all events of PCR %d dropped: %v, %v", pcr, c, err)
		}
	}
	for i, e := range events {
		if e.pcr > 7 || e.typ == evNoAction {
			continue
		}
		kept := append(append([]event(nil), events[:i]...), events[i+1:]...)
		if c, err := attest.ReplayEventLog(joinLog(head, kept), pcrs); !errors.Is(err, attest.ErrEventLog) {
			t.Errorf("event %d (PCR %d) dropped: %v, %v", i, e.pcr, c, err)
		}
	}
}

func TestRefusesEventLogOfAnotherBoot(t *testing.T) {
	if c, err := attest.ReplayEventLog(logs.Rhel8EventLog, realPCRs(t, "Ubuntu2104NoDbx")); !errors.Is(err, attest.ErrEventLog) {
		t.Errorf("%v, %v", c, err)
	}
}

// isSecureBoot finds the event that states Secure Boot: its data end in the
// value.
func isSecureBoot(e event) bool {
	name := []byte("S\x00e\x00c\x00u\x00r\x00e\x00B\x00o\x00o\x00t\x00")
	return e.pcr == 7 && e.typ == evDriverConfig && bytes.Contains(e.data, name)
}

// TestRefusesRelabelledEvents: types are not measured, so a log with other types
// replays; it must not gain the claim that Secure Boot was on.
func TestRefusesRelabelledEvents(t *testing.T) {
	head, off := splitLog(t, logs.Ubuntu2104NoSecureBootEventLog)
	var stated event
	for _, e := range off {
		if isSecureBoot(e) {
			stated = e
		}
	}
	claim := bytes.Clone(stated.data)
	claim[len(claim)-1] = 1

	relabel := func(match func(event) bool, typ uint32) func([]event) []event {
		return func(in []event) []event {
			for i := range in {
				if match(in[i]) {
					in[i].typ = typ
				}
			}
			return in
		}
	}
	sevenSeparator := func(e event) bool { return e.pcr == 7 && e.typ == evSeparator }
	late := []event{measure(7, evDriverConfig, claim), measure(7, evSeparator, make([]byte, 4))}
	for name, bend := range map[string]func([]event) []event{
		"as it is": func(in []event) []event { return in },
		"claim as EV_EFI_VARIABLE_AUTHORITY": func(in []event) []event {
			return append(in, measure(7, evAuthority, claim))
		},
		"claim measured after boot": func(in []event) []event { return append(in, late...) },
		"real statement relabelled as authority, claim after boot": func(in []event) []event {
			return append(relabel(isSecureBoot, evAuthority)(in), late...)
		},
		"real statement relabelled as EV_IPL, claim after boot": func(in []event) []event {
			return append(relabel(isSecureBoot, evIPL)(in), late...)
		},
		"real separator relabelled, claim after boot": func(in []event) []event {
			return append(relabel(sevenSeparator, evIPL)(in), late...)
		},
		"real separator relabelled as driver config, claim after boot": func(in []event) []event {
			return append(relabel(sevenSeparator, evDriverConfig)(in), late...)
		},
		"data exchanged under the measured digest": func(in []event) []event {
			for i := range in {
				if isSecureBoot(in[i]) {
					in[i].data = claim
				}
			}
			return in
		},
	} {
		_, in := splitLog(t, logs.Ubuntu2104NoSecureBootEventLog)
		out := bend(in)
		c, err := attest.ReplayEventLog(joinLog(head, out), replayed(out))
		if err == nil && c.SecureBoot != nil && *c.SecureBoot {
			t.Errorf("%s: the log proves Secure Boot", name)
		}
		if name == "as it is" && (err != nil || c.SecureBoot == nil) {
			t.Fatalf("%s: %v, %v", name, c, err)
		}
	}
	// Without a separator nothing says where firmware ended.
	head, off = splitLog(t, logs.Ubuntu2104NoSecureBootEventLog)
	open := slices.DeleteFunc(off, sevenSeparator)
	if c, err := attest.ReplayEventLog(joinLog(head, open), replayed(open)); err == nil && c.SecureBoot != nil {
		t.Errorf("no separator: Secure Boot %t", *c.SecureBoot)
	}
	// And the claim of a machine with Secure Boot is lost, not kept, by relabelling.
	head, _ = rhel8(t)
	for name, match := range map[string]func(event) bool{"statement": isSecureBoot, "separator": sevenSeparator} {
		for _, typ := range []uint32{evAuthority, evIPL} {
			_, in := rhel8(t)
			out := relabel(match, typ)(in)
			c, err := attest.ReplayEventLog(joinLog(head, out), replayed(out))
			if err == nil && c.SecureBoot != nil {
				t.Errorf("%s relabelled as %#x: Secure Boot %t", name, typ, *c.SecureBoot)
			}
		}
	}
}

func TestEventLogPicksTheStrongestBank(t *testing.T) {
	data := make([]byte, 4)
	head, events := splitLog(t, logs.Rhel8EventLog)
	events = events[:0]
	v256, v384 := map[uint32][]byte{}, map[uint32][]byte{}
	for pcr := range uint32(8) {
		e := measure(pcr, evSeparator, data)
		events = append(events, e)
		for alg, v := range map[uint16]map[uint32][]byte{algSHA256: v256, algSHA384: v384} {
			h := map[uint16]crypto.Hash{algSHA256: crypto.SHA256, algSHA384: crypto.SHA384}[alg]
			d := h.New()
			d.Write(make([]byte, h.Size()))
			d.Write(e.digests[alg])
			v[pcr] = d.Sum(nil)
		}
	}
	pcrs := []attest.PCRBank{{Bank: "sha256", Values: v256}, {Bank: "sha384", Values: v384}}
	c, err := attest.ReplayEventLog(joinLog(head, events), pcrs)
	if err != nil || c.Bank != "sha384" || c.SecureBoot != nil {
		t.Fatalf("%+v, %v", c, err)
	}
	v384[7][0] ^= 1 // the weaker bank does not stand in for the stronger one
	if _, err := attest.ReplayEventLog(joinLog(head, events), pcrs); !errors.Is(err, attest.ErrEventLog) {
		t.Errorf("wrong SHA-384 value: %v", err)
	}
}

func TestRefusesMalformedEventLog(t *testing.T) {
	pcrs := realPCRs(t, "Rhel8")
	for name, log := range map[string][]byte{
		"empty":      {},
		"cut":        logs.Rhel8EventLog[:len(logs.Rhel8EventLog)-1],
		"too big":    make([]byte, attest.MaxEventLog+1),
		"SHA-1 only": logs.Debian10EventLog,
		"trailing":   append(bytes.Clone(logs.Rhel8EventLog), 0),
	} {
		if _, err := attest.ReplayEventLog(log, pcrs); !errors.Is(err, attest.ErrEventLog) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := attest.ReplayEventLog(logs.Rhel8EventLog, nil); !errors.Is(err, attest.ErrEventLog) {
		t.Errorf("no PCRs: %v", err)
	}
	sha1 := []attest.PCRBank{{Bank: "sha1", Values: map[uint32][]byte{7: make([]byte, 20)}}}
	if _, err := attest.ReplayEventLog(logs.Rhel8EventLog, sha1); !errors.Is(err, attest.ErrEventLog) {
		t.Errorf("SHA-1 PCRs: %v", err)
	}
}

func FuzzReplayEventLog(f *testing.F) {
	real := realLogs()
	if len(real) == 0 {
		f.Fatal("no seeds")
	}
	for _, log := range real {
		f.Add(log)
	}
	pcrs := realPCRs(f, "Rhel8")
	f.Fuzz(func(t *testing.T, log []byte) {
		c, err := attest.ReplayEventLog(log, pcrs)
		if err == nil && c.SecureBoot != nil && !*c.SecureBoot {
			t.Error("a log shows Secure Boot off for PCR values that say on")
		}
	})
}
