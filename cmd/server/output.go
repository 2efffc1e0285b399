package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
)

// emit prints v as JSON, or what text writes.
func emit(c *cobra.Command, v any, text func(w io.Writer) error) error {
	if cli.WantsJSON(c) {
		return cli.PrintJSON(c.OutOrStdout(), v)
	}
	return text(c.OutOrStdout())
}

// note writes a word to a person on stderr.
func note(c *cobra.Command, format string, args ...any) {
	fmt.Fprintf(c.ErrOrStderr(), "note: "+format+"\n", args...)
}

// table prints rows in aligned columns.
func table(w io.Writer, rows ...[]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		cells := make([]string, len(r))
		for i, cell := range r {
			cells[i] = cli.Clean(cell) // a TPM's maker and firmware are what its machine says
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	return t.Flush()
}

// fields prints one thing as aligned name and value lines; empty values are
// left out.
type fields [][]string

func (f *fields) add(name string, values ...string) {
	for _, v := range values {
		if v != "" {
			*f = append(*f, []string{name + ":", v})
		}
	}
}

func (f fields) print(w io.Writer) error { return table(w, f...) }

// when is the JSON form of a time given in Unix seconds; 0 is null.
func when(unix int64) *time.Time {
	if unix == 0 {
		return nil
	}
	t := time.Unix(unix, 0).UTC()
	return &t
}

func whenText(unix int64) string {
	if unix == 0 {
		return ""
	}
	return time.Unix(unix, 0).UTC().Format(time.RFC3339)
}

// count is the JSON form of every `count` command.
type count struct {
	Count int32 `json:"count"`
}

func emitCount(c *cobra.Command, n int32) error {
	return emit(c, count{n}, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, n)
		return err
	})
}
