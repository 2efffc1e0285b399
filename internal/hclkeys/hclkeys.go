// Package hclkeys words what is wrong with the keys of a plugin's configuration.
package hclkeys

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/hcl/token"
)

// Unknown is an error about the keys of a plugin's configuration that HCL found
// no field for, with their lines; nil for none. A misspelt key must not leave
// its default in force unnoticed.
func Unknown(keys map[string][]token.Pos) error {
	if len(keys) == 0 {
		return nil
	}
	var each []string
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		if at := keys[k]; len(at) > 0 {
			k = fmt.Sprintf("%s (line %d)", k, at[0].Line)
		}
		each = append(each, k)
	}
	return errors.New("unknown key " + strings.Join(each, ", "))
}
