package cli

import (
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// ConfigFlags adds the flags of a daemon's configuration file.
func ConfigFlags(fs *pflag.FlagSet, path *string, expandEnv *bool) {
	fs.StringVar(path, "config", "", "configuration `FILE` (HCL, in SPIRE's shape); flags win over it")
	fs.BoolVar(expandEnv, "expand-env", false, "replace $NAME and ${NAME} in the configuration file by the environment's variables")
}

// LogFlags adds the flags of a daemon's log.
func LogFlags(fs *pflag.FlagSet, level, format *string) {
	fs.StringVar(level, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(format, "log-format", "text", "text or json")
}

// Logger is the daemon's log as the flags want it, and its level, which may be
// changed while it runs.
func Logger(w io.Writer, level, format string) (*slog.Logger, *slog.LevelVar, error) {
	l := new(slog.LevelVar)
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, nil, Usage("one of debug, info, warn, error", "log level %q is not known", level)
	}
	o := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, o)), l, nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), l, nil
	}
	return nil, nil, Usage("text or json", "log format %q is not known", format)
}

// Validated prints what plugins note about a configuration, and that it is valid
// unless err says otherwise.
func Validated(c *cobra.Command, notes []string, err error) error {
	if WantsJSON(c) && err == nil {
		return PrintJSON(c.OutOrStdout(), struct {
			Valid bool     `json:"valid"`
			Notes []string `json:"notes"`
		}{true, notes})
	}
	for _, n := range notes {
		fmt.Fprintln(c.ErrOrStderr(), "note: "+n)
	}
	if err == nil {
		fmt.Fprintln(c.OutOrStdout(), "valid")
	}
	return err
}
