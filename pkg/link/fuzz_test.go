package link

import "testing"

func FuzzParseStatement(f *testing.F) {
	raw, err := testStatement().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"a","digest":{"sha1":"da39a3ee5e6b4b0d3255bfef95601890afd80709"},"annotations":{"x":[1,null]}}],"predicateType":"https://in-toto.io/attestation/link/v0.3","predicate":{"name":"s","command":null}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseStatement(b)
		if err != nil {
			return
		}
		once, err := s.Marshal()
		if err != nil {
			t.Fatalf("parsed and cannot be written: %v", err)
		}
		again, err := ParseStatement(once)
		if err != nil {
			t.Fatalf("written and cannot be read: %v\n%s", err, once)
		}
		if twice, err := again.Marshal(); err != nil || string(twice) != string(once) {
			t.Fatalf("%v\n%s\n%s", err, once, twice)
		}
	})
}

func FuzzParseBundle(f *testing.F) {
	f.Add(testBundle(f))
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"certificate":{"rawBytes":"AA=="}},"dsseEnvelope":{"payload":"AA==","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":"AA=="}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := ParseBundle(raw)
		if err != nil {
			return
		}
		once, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseBundle(once)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := again.Marshal(); err != nil || string(twice) != string(once) {
			t.Fatalf("%v\n%s\n%s", err, once, twice)
		}
	})
}
