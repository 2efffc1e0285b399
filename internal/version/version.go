// Package version names the build, in the same words for all programs.
package version

import "runtime/debug"

// linked is set by the Makefile (-X) to what git describe says.
var linked string

// String returns the version that was linked in, else what the Go command
// recorded: the module's version, or the revision of the source.
func String() string {
	if linked != "" {
		return linked
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	revision, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	if revision == "" {
		return "unknown"
	}
	return revision[:min(12, len(revision))] + dirty
}
