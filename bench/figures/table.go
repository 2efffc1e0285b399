// Package figures measures rates and what processes use, and prints figures as a
// table, for the programs that benchmark rootlink.
package figures

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Table prints lines as they are measured.
type Table struct{ W io.Writer }

// columns are the widths of all but the last, which wraps at lastColumn.
var columns = []int{47, 36, 18}

const lastColumn = 60

func (t *Table) Head() {
	t.Line("figure", "measured", "target", "beside it")
	t.Line(strings.Repeat("-", columns[0]), strings.Repeat("-", columns[1]), strings.Repeat("-", columns[2]), strings.Repeat("-", lastColumn))
}

func (t *Table) Line(figure, measured, target, beside string) {
	words := wrap(beside, lastColumn)
	t.row(figure, measured, target, words[0])
	for _, more := range words[1:] {
		t.row("", "", "", more)
	}
}

func (t *Table) row(cells ...string) {
	var b strings.Builder
	for i, c := range cells {
		b.WriteString(c)
		if i < len(columns) {
			b.WriteString(strings.Repeat(" ", max(1, columns[i]+2-utf8.RuneCountInString(c))))
		}
	}
	fmt.Fprintln(t.W, strings.TrimRight(b.String(), " "))
}

// wrap breaks text into lines of at most n characters, at least one line.
func wrap(text string, n int) []string {
	lines := []string{""}
	for _, word := range strings.Fields(text) {
		last := &lines[len(lines)-1]
		switch {
		case *last == "":
			*last = word
		case utf8.RuneCountInString(*last)+1+utf8.RuneCountInString(word) <= n:
			*last += " " + word
		default:
			lines = append(lines, word)
		}
	}
	return lines
}

// Most prints a figure that should not exceed target; a target of 0 is none.
func (t *Table) Most(figure string, s Samples, target time.Duration, beside string) {
	aim := ""
	if target > 0 {
		aim = "≤ " + Short(target)
		if s.Median() > target {
			aim += " MISSED"
		}
	}
	t.Line(figure, s.String(), aim, beside)
}

// Times prints what a peer needs, which should be at least least times as much
// as ours of the same rounds.
func (t *Table) Times(figure string, peer Samples, least float64, ours Samples, beside string) {
	var ratios []float64
	for i := range peer {
		ratios = append(ratios, float64(peer[i])/float64(ours[i]))
	}
	aim := fmt.Sprintf("≥ %g × ours", least)
	if Middle(ratios) < least {
		aim += " MISSED"
	}
	t.Line(figure, peer.String(), aim, fmt.Sprintf("%.1f × ours (%.1f … %.1f); %s", Middle(ratios), slices.Min(ratios), slices.Max(ratios), beside))
}

// Ratio prints a ratio that should not exceed target.
func (t *Table) Ratio(figure string, f []float64, target float64, beside string) {
	aim := fmt.Sprintf("≤ %.2f", target)
	if Middle(f) > target {
		aim += " MISSED"
	}
	t.Line(figure, fmt.Sprintf("%.3f (%.3f … %.3f, n=%d)", Middle(f), slices.Min(f), slices.Max(f), len(f)), aim, beside)
}

// Bytes prints a size that should not exceed target.
func (t *Table) Bytes(figure string, n, target int64, beside string) {
	aim := ""
	if target > 0 {
		aim = "≤ " + Bytes(target)
		if n > target {
			aim += " MISSED"
		}
	}
	t.Line(figure, Bytes(n), aim, beside)
}

// Samples are the times of one figure.
type Samples []time.Duration

func (s Samples) At(p float64) time.Duration {
	if len(s) == 0 {
		return 0
	}
	o := slices.Sorted(slices.Values(s))
	return o[max(0, int(math.Ceil(p*float64(len(o))))-1)]
}

func (s Samples) Median() time.Duration { return s.At(0.5) }

func (s Samples) String() string {
	if len(s) == 1 {
		return Short(s[0])
	}
	return fmt.Sprintf("%s (%s … %s, n=%d)", Short(s.Median()), Short(s.At(0.1)), Short(s.At(0.9)), len(s))
}

// Short prints three digits of a duration.
func Short(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + Short(-d)
	case d >= 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d >= time.Millisecond:
		return digits(float64(d)/float64(time.Millisecond)) + " ms"
	}
	return digits(float64(d)/float64(time.Microsecond)) + " µs"
}

func digits(f float64) string {
	switch {
	case f >= 100:
		return fmt.Sprintf("%.0f", f)
	case f >= 10:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.2f", f)
}

func Bytes(n int64) string {
	switch {
	case n >= 1<<20:
		return digits(float64(n)/(1<<20)) + " MiB"
	case n >= 10<<10:
		return digits(float64(n)/(1<<10)) + " KiB"
	}
	return fmt.Sprintf("%d bytes", n)
}

// Middle is the median of rates.
func Middle(f []float64) float64 {
	if len(f) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(f))[len(f)/2]
}
