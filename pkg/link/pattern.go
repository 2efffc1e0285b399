package link

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ValidatePattern fails on anything but a SPIFFE ID pattern: a SPIFFE ID in
// which a path segment may hold "*", for any run of characters within that
// segment, and whose last segment may be "**", for one or more whole segments.
// The trust domain is always exact.
func ValidatePattern(pattern string) error {
	if len(pattern) > MaxPattern {
		return malformed("SPIFFE ID pattern of %d bytes, at most %d allowed", len(pattern), MaxPattern)
	}
	_, path, err := splitPattern(pattern)
	if err != nil {
		return err
	}
	segments := strings.Split(path, "/")
	for i, s := range segments {
		if s == "**" && i == len(segments)-1 {
			continue
		}
		if strings.Contains(s, "**") {
			return malformed("SPIFFE ID pattern %q: ** must be the whole last segment", pattern)
		}
		// With the stars filled in, what remains must be a real SPIFFE ID path.
		if err := spiffeid.ValidatePathSegment(strings.ReplaceAll(s, "*", "x")); err != nil {
			return malformed("SPIFFE ID pattern %q: %w", pattern, err)
		}
	}
	return nil
}

// MatchPattern says whether id matches pattern. A malformed pattern or ID
// matches nothing.
func MatchPattern(pattern, id string) bool {
	if ValidatePattern(pattern) != nil {
		return false
	}
	sid, err := spiffeid.FromString(id)
	if err != nil {
		return false
	}
	td, path, _ := splitPattern(pattern)
	if td != sid.TrustDomain().Name() || sid.Path() == "" {
		return false
	}
	want := strings.Split(path, "/")
	have := strings.Split(strings.TrimPrefix(sid.Path(), "/"), "/")
	for i, w := range want {
		if w == "**" {
			return len(have) > i
		}
		if i >= len(have) || !matchSegment(w, have[i]) {
			return false
		}
	}
	return len(want) == len(have)
}

// splitPattern returns trust domain and path without its leading slash.
func splitPattern(pattern string) (td, path string, err error) {
	rest, ok := strings.CutPrefix(pattern, "spiffe://")
	if !ok {
		return "", "", malformed("SPIFFE ID pattern %q does not begin with spiffe://", pattern)
	}
	td, path, ok = strings.Cut(rest, "/")
	if !ok || path == "" {
		return "", "", malformed("SPIFFE ID pattern %q has no path", pattern)
	}
	if _, err := spiffeid.TrustDomainFromString(td); err != nil {
		return "", "", malformed("SPIFFE ID pattern %q: %w", pattern, err)
	}
	return td, path, nil
}

// matchSegment matches one segment; each * stands for any run of characters.
// It advances greedily from the left, which is linear: no input can make it
// backtrack without end.
func matchSegment(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	first, last := parts[0], parts[len(parts)-1]
	if len(s) < len(first)+len(last) || !strings.HasPrefix(s, first) || !strings.HasSuffix(s, last) {
		return false
	}
	s = s[len(first) : len(s)-len(last)]
	for _, p := range parts[1 : len(parts)-1] {
		i := strings.Index(s, p)
		if i < 0 {
			return false
		}
		s = s[i+len(p):]
	}
	return true
}
