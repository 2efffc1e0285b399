package verifycmd

import (
	"bytes"
	"time"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/report"
	"github.com/rootlink/rootlink/internal/version"
	"github.com/rootlink/rootlink/pkg/link"
)

// writeReport writes the page about a result, whatever the verdict: a refusal
// is what a reader most wants explained. steps are those of the layout, if any.
func writeReport(path string, res *link.Result, steps []report.Step, now time.Time) error {
	if path == "" {
		return nil
	}
	var page bytes.Buffer
	if err := report.Write(&page, res, report.Options{Steps: steps, Now: now, By: "rootlink " + version.String()}); err != nil {
		return err
	}
	return files.Write(path, page.Bytes(), 0o644)
}
