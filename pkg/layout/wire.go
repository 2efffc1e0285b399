package layout

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/strictjson"
)

// The wire format is in-toto's layout. What it has no field for is one line of
// JSON at the end of readme: in-toto-golang refuses unknown fields, and
// in-toto 1.x in Python drops them before it checks the signature, so readme is
// the one place that both keep, sign and do not interpret.
const extensionMark = "rootlink-layout-v1: "

// extension is what that line holds. It is authoritative: certificate
// constraints repeat what they can say of it for others.
type extension struct {
	Name   string    `json:"name"`
	Serial uint64    `json:"serial"`
	Issued time.Time `json:"issued"`
	Steps  []Demands `json:"steps"`
}

// encode is compact JSON without HTML escaping.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// wire returns l as in-toto has it; with constraints where they can say what
// the extension says.
func (l *Layout) wire(constraints bool) (in_toto.Layout, error) {
	ext := extension{Name: l.Name, Serial: l.Serial, Issued: l.Issued.UTC().Truncate(time.Second)}
	w := in_toto.Layout{
		Type: "layout", Steps: []in_toto.Step{}, Inspect: []in_toto.Inspection{}, Keys: map[string]in_toto.Key{},
		Expires: l.Expires.UTC().Format(in_toto.ISO8601DateSchema),
	}
	for id, k := range l.Keys {
		w.Keys[id] = k
	}
	for i := range l.Steps {
		s := &l.Steps[i]
		d := s.Demands
		d.Step = s.Name
		ext.Steps = append(ext.Steps, d)
		step := in_toto.Step{
			Type: "step", PubKeys: orEmpty(s.PubKeys), ExpectedCommand: orEmpty(s.Command), Threshold: s.Threshold,
			SupplyChainItem: in_toto.SupplyChainItem{Name: s.Name, ExpectedMaterials: orEmpty(s.Materials), ExpectedProducts: orEmpty(s.Products)},
		}
		if constraints {
			step.CertificateConstraints = s.constraints()
		}
		w.Steps = append(w.Steps, step)
	}
	for _, in := range l.Inspections {
		w.Inspect = append(w.Inspect, in_toto.Inspection{
			Type: "inspection", Run: orEmpty(in.Run),
			SupplyChainItem: in_toto.SupplyChainItem{Name: in.Name, ExpectedMaterials: orEmpty(in.Materials), ExpectedProducts: orEmpty(in.Products)},
		})
	}
	line, err := encode(ext)
	if err != nil {
		return w, err
	}
	if w.Readme = extensionMark + string(line); l.Readme != "" {
		w.Readme = l.Readme + "\n\n" + w.Readme
	}
	return w, nil
}

func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// constraints says in in-toto's terms who may sign. They know whole names and
// "anything", no patterns: a pattern, or a demand for certain authorities, is
// left out rather than widened, so that a tool which knows constraints alone
// finds nobody for the step and refuses.
func (s *Step) constraints() []in_toto.CertificateConstraint {
	var out []in_toto.CertificateConstraint
	if len(s.Authorities) > 0 {
		return nil
	}
	any := []string{in_toto.AllowAllConstraint}
	for _, id := range s.Identities {
		if strings.Contains(id, "*") {
			return nil
		}
		out = append(out, in_toto.CertificateConstraint{
			CommonName: in_toto.AllowAllConstraint, DNSNames: any, Emails: any, Organizations: any, Roots: any, URIs: []string{id},
		})
	}
	return out
}

// Marshal encodes l as an unsigned document that people may read and edit.
func (l *Layout) Marshal() ([]byte, error) {
	if err := l.Validate(); err != nil {
		return nil, err
	}
	w, err := l.wire(true)
	if err != nil {
		return nil, err
	}
	raw, err := encode(w)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	if b.Len() > MaxFile {
		return nil, malformed("layout of %d bytes, at most %d allowed", b.Len(), MaxFile)
	}
	return b.Bytes(), nil
}

// wireLayout is in_toto.Layout with those fields required that decide: absent
// ones would be a demand that somebody thinks is there.
type wireLayout struct {
	Type    *string                 `json:"_type"`
	Steps   *[]wireStep             `json:"steps"`
	Inspect *[]in_toto.Inspection   `json:"inspect"`
	Keys    *map[string]in_toto.Key `json:"keys"`
	Expires *string                 `json:"expires"`
	Readme  *string                 `json:"readme"`
}

type wireStep struct {
	Type        *string                          `json:"_type"`
	PubKeys     *[]string                        `json:"pubkeys"`
	Constraints *[]in_toto.CertificateConstraint `json:"cert_constraints"`
	Command     *[]string                        `json:"expected_command"`
	Threshold   *int                             `json:"threshold"`
	Name        *string                          `json:"name"`
	Materials   *[][]string                      `json:"expected_materials"`
	Products    *[][]string                      `json:"expected_products"`
}

// parse decodes the document that is signed.
func parse(raw []byte) (*Layout, error) {
	var w wireLayout
	if err := decodeStrict(raw, MaxFile, "none", &w); err != nil {
		return nil, fmt.Errorf("layout: %w", err)
	}
	if w.Type == nil || w.Steps == nil || w.Inspect == nil || w.Keys == nil || w.Expires == nil || w.Readme == nil {
		return nil, malformed("layout: a field of _type, steps, inspect, keys, expires, readme is missing")
	}
	if *w.Type != "layout" {
		return nil, malformed("layout: _type %q", *w.Type)
	}
	if len(*w.Steps) > MaxSteps || len(*w.Inspect) > MaxInspections || len(*w.Keys) > MaxKeys {
		return nil, malformed("layout: %d steps, %d inspections, %d keys: at most %d, %d, %d allowed",
			len(*w.Steps), len(*w.Inspect), len(*w.Keys), MaxSteps, MaxInspections, MaxKeys)
	}
	l := &Layout{Keys: *w.Keys}
	var err error
	if l.Expires, err = time.Parse(in_toto.ISO8601DateSchema, *w.Expires); err != nil {
		return nil, malformed("layout: expires: %w", err)
	}
	ext, err := l.readExtension(*w.Readme)
	if err != nil {
		return nil, fmt.Errorf("layout: %w", err)
	}
	if len(ext.Steps) != len(*w.Steps) {
		return nil, malformed("layout: %d steps, and demands on %d", len(*w.Steps), len(ext.Steps))
	}
	for i, ws := range *w.Steps {
		s, err := ws.read(ext.Steps[i])
		if err != nil {
			return nil, fmt.Errorf("layout: step %d: %w", i+1, err)
		}
		l.Steps = append(l.Steps, *s)
	}
	for _, in := range *w.Inspect {
		if in.Type != "inspection" {
			return nil, malformed("layout: inspection of type %q", in.Type)
		}
		l.Inspections = append(l.Inspections, Inspection{Name: in.Name, Run: in.Run, Materials: in.ExpectedMaterials, Products: in.ExpectedProducts})
	}
	if err := l.Validate(); err != nil {
		return nil, err
	}
	return l, nil
}

// readExtension takes readme apart: people's text, and the last line.
func (l *Layout) readExtension(readme string) (*extension, error) {
	if len(readme) > MaxReadme+MaxFile/2 {
		return nil, malformed("readme of %d bytes", len(readme))
	}
	text, line, ok := strings.Cut(readme, extensionMark)
	switch {
	case !ok:
		return nil, malformed("no line %q in readme: a layout that names no identities, serial and time of issue", strings.TrimSpace(extensionMark))
	case text != "" && !strings.HasSuffix(text, "\n") || strings.Contains(line, extensionMark) || strings.Contains(line, "\n"):
		// Two could be read differently; so could one in the middle of a text.
		return nil, malformed("the line %q must be the last of readme, and the only one", strings.TrimSpace(extensionMark))
	}
	var ext extension
	if err := decodeStrict([]byte(line), MaxFile, "none", &ext); err != nil {
		return nil, fmt.Errorf("extension: %w", err)
	}
	l.Readme = strings.TrimSuffix(text, "\n\n")
	l.Name, l.Serial, l.Issued = ext.Name, ext.Serial, ext.Issued
	return &ext, nil
}

func (w wireStep) read(d Demands) (*Step, error) {
	if w.Type == nil || w.PubKeys == nil || w.Command == nil || w.Threshold == nil || w.Name == nil || w.Materials == nil || w.Products == nil {
		return nil, malformed("a field is missing")
	}
	if *w.Type != "step" {
		return nil, malformed("_type %q", *w.Type)
	}
	if d.Step != *w.Name {
		return nil, malformed("its name is %q, that of the demands in its place %q", *w.Name, d.Step)
	}
	s := &Step{Name: *w.Name, Command: *w.Command, Materials: *w.Materials, Products: *w.Products, Threshold: *w.Threshold, PubKeys: *w.PubKeys, Demands: d}
	if w.Constraints != nil {
		// Said twice, it must be the same: old tools go by the one, we by the other.
		want, err := encode(s.constraints())
		if err != nil {
			return nil, err
		}
		if have, err := encode(*w.Constraints); err != nil || !bytes.Equal(have, want) {
			return nil, malformed("%q: its certificate constraints are not those of its identities", s.Name)
		}
	}
	return s, nil
}

func decodeStrict(b []byte, limit int, open string, v any) error {
	if err := strictjson.Decode(b, limit, open, v); err != nil {
		return malformed("%w", err)
	}
	return nil
}
