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
// value that could end a string and begin another key.
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
		out.WriteString(os.Expand(code, func(name string) string {
			v, ok := lookup(name)
			switch {
			case !ok:
				return say("the variable %s is not set", name)
			case strings.ContainsAny(v, "\"\\\n\r\x00") || strings.Contains(v, "${"):
				return say("the value of %s holds characters that could change what the file says", name)
			}
			return v
		}))
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
