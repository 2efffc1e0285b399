package version

import "testing"

func TestStringNamesTheBuild(t *testing.T) {
	if v := String(); v == "" || v == "(devel)" {
		t.Errorf("without a linked version: %q names no build", v)
	}
	defer func(was string) { linked = was }(linked)
	linked = "v1.2.3"
	if v := String(); v != "v1.2.3" {
		t.Errorf("linked v1.2.3, got %q", v)
	}
}
