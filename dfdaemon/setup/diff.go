package setup

import (
	"bytes"
	"fmt"
	"strings"
)

const context = 3 // lines around a change

// diff is what happens to a file, in the unified form: one hunk from the first
// line that changes to the last.
func diff(f *file) string {
	a, b := lines(f.was), lines(f.now)
	head, tail := 0, 0
	for head < min(len(a), len(b)) && bytes.Equal(a[head], b[head]) {
		head++
	}
	for tail < min(len(a), len(b))-head && bytes.Equal(a[len(a)-1-tail], b[len(b)-1-tail]) {
		tail++
	}
	from, behind := max(0, head-context), max(0, tail-context)
	var out strings.Builder
	fmt.Fprintf(&out, "--- %s\n+++ %s\n@@ -%s +%s @@\n", side(f.path, f.there), side(f.path, f.stays),
		span(from, len(a)-behind), span(from, len(b)-behind))
	for _, part := range []struct {
		sign  byte
		lines [][]byte
	}{{' ', a[from:head]}, {'-', a[head : len(a)-tail]}, {'+', b[head : len(b)-tail]}, {' ', a[len(a)-tail : len(a)-behind]}} {
		for _, line := range part.lines {
			out.WriteByte(part.sign)
			out.Write(line)
			if !bytes.HasSuffix(line, []byte("\n")) {
				out.WriteString("\n\\ No newline at end of file\n")
			}
		}
	}
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
