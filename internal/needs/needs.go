// Package needs says what a test wants of its machine. A test that does not run
// proves nothing, so where CI is set, what is missing fails it. Elsewhere it is
// skipped, and somebody without root can still run all the others.
package needs

import (
	"os"
	"testing"
)

// Root wants the test to run as root.
func Root(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		Missing(tb, "this test runs as root only")
	}
}

// Missing ends a test for lack of something: a device, a right, a kernel feature.
func Missing(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("CI") != "" {
		tb.Fatalf(format, args...)
	}
	tb.Skipf(format, args...)
}
