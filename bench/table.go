package main

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// table prints lines as they are measured.
type table struct{ w io.Writer }

// columns are the widths of all but the last, which wraps at lastColumn.
var columns = []int{47, 36, 18}

const lastColumn = 60

func (t *table) head() {
	t.line("figure", "measured", "target", "beside it")
	t.line(strings.Repeat("-", columns[0]), strings.Repeat("-", columns[1]), strings.Repeat("-", columns[2]), strings.Repeat("-", lastColumn))
}

func (t *table) line(figure, measured, target, beside string) {
	words := wrap(beside, lastColumn)
	t.row(figure, measured, target, words[0])
	for _, more := range words[1:] {
		t.row("", "", "", more)
	}
}

func (t *table) row(cells ...string) {
	var b strings.Builder
	for i, c := range cells {
		b.WriteString(c)
		if i < len(columns) {
			b.WriteString(strings.Repeat(" ", max(1, columns[i]+2-utf8.RuneCountInString(c))))
		}
	}
	fmt.Fprintln(t.w, strings.TrimRight(b.String(), " "))
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

// most prints a figure that should not exceed target; a target of 0 is none.
func (t *table) most(figure string, s samples, target time.Duration, beside string) {
	aim := ""
	if target > 0 {
		aim = "≤ " + short(target)
		if s.median() > target {
			aim += " MISSED"
		}
	}
	t.line(figure, s.String(), aim, beside)
}

// times prints what a peer needs, which should be at least least times as much
// as ours of the same rounds.
func (t *table) times(figure string, peer samples, least float64, ours samples, beside string) {
	var ratios []float64
	for i := range peer {
		ratios = append(ratios, float64(peer[i])/float64(ours[i]))
	}
	aim := fmt.Sprintf("≥ %g × ours", least)
	if middle(ratios) < least {
		aim += " MISSED"
	}
	t.line(figure, peer.String(), aim, fmt.Sprintf("%.1f × ours (%.1f … %.1f); %s", middle(ratios), slices.Min(ratios), slices.Max(ratios), beside))
}

// ratio prints a ratio that should not exceed target.
func (t *table) ratio(figure string, f []float64, target float64, beside string) {
	aim := fmt.Sprintf("≤ %.2f", target)
	if middle(f) > target {
		aim += " MISSED"
	}
	t.line(figure, fmt.Sprintf("%.3f (%.3f … %.3f, n=%d)", middle(f), slices.Min(f), slices.Max(f), len(f)), aim, beside)
}

// bytes prints a size that should not exceed target.
func (t *table) bytes(figure string, n, target int64, beside string) {
	aim := ""
	if target > 0 {
		aim = "≤ " + size(target)
		if n > target {
			aim += " MISSED"
		}
	}
	t.line(figure, size(n), aim, beside)
}

// samples are the times of one figure.
type samples []time.Duration

func (s samples) at(p float64) time.Duration {
	if len(s) == 0 {
		return 0
	}
	o := slices.Sorted(slices.Values(s))
	return o[max(0, int(math.Ceil(p*float64(len(o))))-1)]
}

func (s samples) median() time.Duration { return s.at(0.5) }

func (s samples) String() string {
	if len(s) == 1 {
		return short(s[0])
	}
	return fmt.Sprintf("%s (%s … %s, n=%d)", short(s.median()), short(s.at(0.1)), short(s.at(0.9)), len(s))
}

// short prints three digits of a duration.
func short(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + short(-d)
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

func size(n int64) string {
	switch {
	case n >= 1<<20:
		return digits(float64(n)/(1<<20)) + " MiB"
	case n >= 10<<10:
		return digits(float64(n)/(1<<10)) + " KiB"
	}
	return fmt.Sprintf("%d bytes", n)
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if k, v, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	one, _, _ := strings.Cut(string(b), " ")
	return one
}

// middle is the median of rates.
func middle(f []float64) float64 {
	if len(f) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(f))[len(f)/2]
}
