package setup

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
)

// secret is a value that may be one: under a name that says so, or in a URL.
var secret = regexp.MustCompile(`(?i)([\w."'-]*(?:pass|pwd|auth|token|secret|cred|key|cookie|user)[\w.-]*["']?\s*[:=]\s*)("[^"]*"?|'[^']*'?|\[[^\]]*\]?|[^\s,}]+)|(://)[^/@\s"']+@`)

// diff is what happens to a file, in the unified form: one hunk from the first
// line that changes to the last, without lines around it, which are nobody's
// business. What may be secret in a line that changes is not shown.
func diff(f *file) string {
	a, b := lines(f.was), lines(f.now)
	head, tail := 0, 0
	for head < min(len(a), len(b)) && bytes.Equal(a[head], b[head]) {
		head++
	}
	for tail < min(len(a), len(b))-head && bytes.Equal(a[len(a)-1-tail], b[len(b)-1-tail]) {
		tail++
	}
	var out strings.Builder
	fmt.Fprintf(&out, "--- %s\n+++ %s\n@@ -%s +%s @@\n", side(f.path, f.there), side(f.path, f.stays),
		span(head, len(a)-tail), span(head, len(b)-tail))
	part := func(sign byte, lines [][]byte) {
		for _, line := range lines {
			out.WriteByte(sign)
			out.Write(secret.ReplaceAll(line, []byte("$1$3***")))
			if !bytes.HasSuffix(line, []byte("\n")) {
				out.WriteString("\n\\ No newline at end of file\n")
			}
		}
	}
	part('-', a[head:len(a)-tail])
	part('+', b[head:len(b)-tail])
	return out.String()
}

func lines(b []byte) (list [][]byte) {
	for line := range bytes.Lines(b) {
		list = append(list, line)
	}
	return list
}

func side(path string, there bool) string {
	if !there {
		return "/dev/null"
	}
	return path
}

// span is the lines from one to before another, as a hunk's header has them.
func span(from, to int) string {
	if to == from {
		return fmt.Sprintf("%d,0", from)
	}
	return fmt.Sprintf("%d,%d", from+1, to-from)
}
