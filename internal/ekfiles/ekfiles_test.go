package ekfiles_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/ekfiles"
)

func TestHashFiles(t *testing.T) {
	h := strings.Repeat("ab", 32)
	path := filepath.Join(t.TempDir(), "list")
	for text, want := range map[string]int{
		"": 0, "# nothing\n\n": 0, h + "\n" + h: 1, "  " + strings.ToUpper(h) + " # why\r\n": 1,
		h[1:]: -1, h + h: -1, h + " " + h: -1, "zz": -1,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ekfiles.ReadHashes("ek_allow", path)
		if (err != nil) != (want < 0) || err == nil && len(got) != want {
			t.Errorf("%q: %d hashes, %v", text, len(got), err)
		}
	}
}
