package config

import (
	"bytes"
	"fmt"
	"os"
	"strings"
)

// Expand replaces $NAME and ${NAME} by what lookup says, as SPIRE's -expandEnv
// does, in the whole text: values without quotes too. A variable that is not set
// is an error with its line, where SPIRE would go on with nothing there; so is a
// value that could end a string and begin another key, and without quotes one that
// is more than a word: HCL takes several keys on one line.
func Expand(path string, content []byte, lookup func(string) (string, bool)) ([]byte, error) {
	var out bytes.Buffer
	line := 0
	for text := range bytes.Lines(content) {
		line++
		var wrong string
		say := func(format string, args ...any) string {
			if wrong == "" {
				wrong = fmt.Sprintf(format, args...)
			}
			return ""
		}
		// A comment may speak of variables that nobody sets.
		code, comment := cutComment(string(text))
		for _, part := range splitQuoted(code) {
			out.WriteString(os.Expand(part, func(name string) string {
				v, ok := lookup(name)
				switch {
				case !ok:
					return say("the variable %s is not set", name)
				case part[0] == '"' && (strings.ContainsAny(v, "\"\\\n\r\x00") || strings.Contains(v, "${")):
					return say("the value of %s holds characters that could change what the file says", name)
				case part[0] != '"' && strings.ContainsFunc(v, notPlain):
					return say("the value of %s is more than a word or a number; put quotes around the variable", name)
				}
				return v
			}))
		}
		out.WriteString(comment)
		if wrong != "" {
			return nil, usage(&Error{path, line, wrong})
		}
		if out.Len() > maxFile {
			return nil, usage(&Error{path, line, "the file is too large with its variables replaced"})
		}
	}
	return out.Bytes(), nil
}

// notPlain is any character that neither a number, a word nor true is made of.
func notPlain(r rune) bool {
	return !('0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || strings.ContainsRune("_.+-", r))
}

// splitQuoted parts a line into strings, with their quotes, and what is between
// them.
func splitQuoted(line string) (parts []string) {
	start, quoted := 0, false
	for i := 0; i < len(line); i++ {
		switch {
		case line[i] == '\\' && quoted:
			i++
		case line[i] == '"':
			end := i
			if quoted {
				end++
			}
			if end > start {
				parts = append(parts, line[start:end])
			}
			start, quoted = end, !quoted
		}
	}
	if start < len(line) {
		parts = append(parts, line[start:])
	}
	return parts
}

// cutComment cuts a line where # or // begins outside of quotes.
func cutComment(line string) (code, comment string) {
	quoted := false
	for i := 0; i < len(line); i++ {
		switch {
		case line[i] == '\\' && quoted:
			i++
		case line[i] == '"':
			quoted = !quoted
		case !quoted && (line[i] == '#' || strings.HasPrefix(line[i:], "//")):
			return line[:i], line[i:]
		}
	}
	return line, ""
}
