package tpm_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/pkg/attest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// A restricted key signs what the TPM made, and the one part of that which is
// not the TPM's is extraData. Whoever could choose it could have this machine
// vouch for a key, a tool or a statement that it never saw. So nobody chooses
// it: the TPM signs hashes that are made here, over fields that have a meaning.

// TestRefusesRawQuoteRequest asks for a quote over bytes of the caller's choice
// in each place that takes some, and looks at what the TPM signed.
func TestRefusesRawQuoteRequest(t *testing.T) {
	sw := swtpmtest.Start(t)
	d, ctx := open(t, sw, tpm.Options{}), background(t)
	ak, err := d.AK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// What a forger wants signed: the commitment to a leaf of its own.
	forged := attest.QuoteExtraData(1, [32]byte{0xbd}, ak.Name)
	signed := func(q *tpm.Quoted, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		a, err := tpm2.Unmarshal[tpm2.TPMSAttest](q.Attest)
		if err != nil {
			t.Fatal(err)
		}
		return a.ExtraData.Buffer
	}
	sel := attest.DefaultPCRs()
	for name, c := range map[string]struct{ got, want [32]byte }{
		"as a nonce":    {[32]byte(signed(d.QuoteNode(ctx, sel, forged, "example.org", [32]byte{}))), attest.NodeExtraData(forged, ak.Name, "example.org", [32]byte{})},
		"as a key hash": {[32]byte(signed(d.QuoteNode(ctx, sel, [32]byte{}, "example.org", forged))), attest.NodeExtraData([32]byte{}, ak.Name, "example.org", forged)},
		"as a trust domain": {
			[32]byte(signed(d.QuoteNode(ctx, sel, [32]byte{}, string(forged[:]), [32]byte{}))),
			attest.NodeExtraData([32]byte{}, ak.Name, string(forged[:]), [32]byte{}),
		},
	} {
		if c.got != c.want || c.got == forged {
			t.Errorf("%s: the TPM signed %x, want our hash %x", name, c.got, c.want)
		}
	}
	leaf := leavesOf(t, 1)[0]
	leaf.Nonce, leaf.Payload, leaf.SVIDKey, leaf.Salt = forged, forged, forged, [16]byte(forged[:16])
	q, err := d.QuoteLeaves(ctx, sel, []*attest.Leaf{leaf})
	if err != nil {
		t.Fatal(err)
	}
	want := attest.QuoteExtraData(1, q.Tree.Root(), ak.Name)
	if got := signed(&q.Quoted, nil); !bytes.Equal(got, want[:]) || bytes.Equal(got, forged[:]) {
		t.Errorf("as every field of a leaf: the TPM signed %x, want our hash %x", got, want)
	}
}

// TestQuoteRequestNamesNoDigest: the messages that reach the Quoter. A field
// added here has to be thought about there.
func TestQuoteRequestNamesNoDigest(t *testing.T) {
	fields := func(v any) (names []string) {
		typ := reflect.TypeOf(v)
		for i := range typ.NumField() {
			if f := typ.Field(i); f.IsExported() {
				names = append(names, f.Name)
			}
		}
		return names
	}
	if got := fields(tpmv1.QuoteRequest{}); !slices.Equal(got, []string{"Leaf", "Pcrs"}) {
		t.Errorf("a quote is asked for by %v", got)
	}
	want := []string{
		"Kind", "KeyOrigin", "TrustDomain", "SpiffeId", "SvidKeySha256", "AgentKeySha256", "Executable",
		"Recorder", "Tool", "Payload", "Selectors", "Nonce",
	}
	if got := fields(tpmv1.Leaf{}); !slices.Equal(got, want) {
		t.Errorf("a leaf has %v", got)
	}
	if got := fields(tpmv1.InfoRequest{}); len(got) != 0 {
		t.Errorf("Info takes %v", got)
	}
	methods := 0
	for _, m := range tpmv1.Quoter_ServiceDesc.Methods {
		if methods++; m.MethodName != "Quote" && m.MethodName != "Info" {
			t.Errorf("the Quoter has grown %s", m.MethodName)
		}
	}
	if methods != 2 || len(tpmv1.Quoter_ServiceDesc.Streams) != 0 {
		t.Errorf("the Quoter has %d calls and %d streams", methods, len(tpmv1.Quoter_ServiceDesc.Streams))
	}
}

// signs are the commands of a TPM that sign with the AK or could.
var signs = []string{
	"Certify", "CertifyCreation", "CertifyX509", "Commit", "GetCommandAuditDigest", "GetSessionAuditDigest", "GetTime",
	"NVCertify", "Quote", "Sign",
}

// TestNobodyOutsideChoosesExtraData reads our own source: which functions have
// the TPM sign, who calls them, and what those let a caller say.
func TestNobodyOutsideChoosesExtraData(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	commands, callers := map[string][]string{}, map[string]bool{}
	takes := map[string]string{} // exported methods of Device, with their parameters
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range f.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if fn.Name.IsExported() {
				takes[fn.Name.Name] = parameters(fn)
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok {
					if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "tpm2" && slices.Contains(signs, sel.Sel.Name) {
						commands[sel.Sel.Name] = append(commands[sel.Sel.Name], fn.Name.Name)
					}
				}
				if call, ok := n.(*ast.CallExpr); ok {
					if sel, ok := call.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "quote" {
						callers[fn.Name.Name] = true
					}
				}
				return true
			})
		}
	}
	// CertifyCreation is over the AK just made, with nothing of a caller's.
	if want := map[string][]string{"Quote": {"quote"}, "CertifyCreation": {"makeAK"}}; !reflect.DeepEqual(commands, want) {
		t.Errorf("the TPM signs in %v, want %v", commands, want)
	}
	if want := map[string]bool{"QuoteNode": true, "QuoteLeaves": true, "quote": true}; !reflect.DeepEqual(callers, want) {
		t.Errorf("quote is called by %v, want %v", callers, want)
	}
	for name, want := range map[string]string{
		"QuoteNode":   "context.Context, []attest.PCRSelection, [32]byte, string, [32]byte",
		"QuoteLeaves": "context.Context, []attest.PCRSelection, []*attest.Leaf",
	} {
		if takes[name] != want {
			t.Errorf("%s takes (%s), want (%s)", name, takes[name], want)
		}
	}
	for name, params := range takes {
		if strings.Contains(params, "func") {
			t.Errorf("%s takes a function, which could choose what is signed", name)
		}
	}
}

func parameters(fn *ast.FuncDecl) string {
	var out []string
	for _, p := range fn.Type.Params.List {
		for range max(len(p.Names), 1) {
			out = append(out, typeText(p.Type))
		}
	}
	return strings.Join(out, ", ")
}

func typeText(e ast.Expr) string {
	switch x := e.(type) {
	case *ast.Ident:
		return x.Name
	case *ast.SelectorExpr:
		return typeText(x.X) + "." + x.Sel.Name
	case *ast.StarExpr:
		return "*" + typeText(x.X)
	case *ast.ArrayType:
		if l, ok := x.Len.(*ast.BasicLit); ok {
			return "[" + l.Value + "]" + typeText(x.Elt)
		}
		return "[]" + typeText(x.Elt)
	case *ast.FuncType:
		return "func"
	}
	return "?"
}
