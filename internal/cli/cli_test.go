package cli

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
)

func TestReport(t *testing.T) {
	base := errors.New("no such socket")
	for _, c := range []struct {
		name string
		err  error
		code int
		out  string
	}{
		{"nil", nil, ExitOK, ""},
		{"plain", base, ExitInternal, "error: no such socket\n"},
		{"hint keeps internal", Hint(base, "start the agent"), ExitInternal, "error: no such socket\nhint: start the agent\n"},
		{"hint keeps code", Hint(Fail(ExitPolicy, base, ""), "do"), ExitPolicy, "error: no such socket\nhint: do\n"},
		{"wrapped", fmt.Errorf("ask: %w", Fail(ExitCrypto, base, "why")), ExitCrypto, "error: ask: no such socket\nhint: why\n"},
		{"inner hint", Fail(ExitPolicy, Hint(base, "inner"), ""), ExitPolicy, "error: no such socket\nhint: inner\n"},
		{
			"a stranger's words", errors.New("signal \x1b[2J\r\u202e\u009b31mVERIFIED\nhint: ünder"), ExitInternal,
			"error: signal \\u001b[2J\\u000d\\u202e\\u009b31mVERIFIED\n  hint: ünder\n",
		},
		{"usage", Usage("see --help", "bad %s", "flag"), ExitUsage, "error: bad flag\nhint: see --help\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			if code := Report(&b, c.err); code != c.code || b.String() != c.out {
				t.Errorf("code %d out %q, want %d %q", code, b.String(), c.code, c.out)
			}
		})
	}
}
