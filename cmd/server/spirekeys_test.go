package main

import (
	"testing"

	"github.com/rootlink/rootlink/internal/config"
)

// A key of SPIRE's that stands for a flag which is gone would be an error only
// for whoever has it in a file.
func TestSPIREsKeysAreFlags(t *testing.T) {
	run := newRoot().Commands()
	flags := config.SPIREFlags("server")
	if len(flags) < 4 {
		t.Fatalf("%d flags", len(flags))
	}
	for _, c := range run {
		if c.Name() != "run" && c.Name() != "validate" {
			continue
		}
		for _, name := range flags {
			if c.Flag(name) == nil {
				t.Errorf("%s has no --%s", c.Name(), name)
			}
		}
	}
}
