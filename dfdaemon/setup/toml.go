package setup

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// ours marks each entry. What we write stands on lines of its own, so that it
// can be found and taken out again whatever happens around it.
const ours = "# by dfdaemon setup"

// Edit is one change of a text: Old has become New.
type Edit struct {
	Old string `json:"old"`
	New string `json:"new"`
	// Mark is what shows that the entry is still there when New is not.
	Mark string `json:"mark"`
}

// expression is a table's header, or a key and its value, in a TOML text.
type expression struct {
	kind  unstable.Kind // Table, ArrayTable or KeyValue
	table []string      // the table that it is in, or that it begins
	key   []string      // of KeyValue, below table
	at    int           // where its line begins
	value [2]int        // of a KeyValue that is a string, where that is
}

// parseTOML reads a text twice: what it means and where that stands.
func parseTOML(b []byte) (doc map[string]any, es []expression, err error) {
	if err := toml.Unmarshal(b, &doc); err != nil {
		if e, ok := errors.AsType[*toml.DecodeError](err); ok {
			line, column := e.Position()
			return nil, nil, fmt.Errorf("it is no TOML: line %d, column %d: %w", line, column, err)
		}
		return nil, nil, fmt.Errorf("it is no TOML: %w", err)
	}
	if doc == nil {
		doc = map[string]any{}
	}
	p := unstable.Parser{}
	p.Reset(b)
	var table []string
	for p.NextExpression() {
		n := p.Expression()
		var key []string
		at := -1
		for it := n.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
			if at < 0 {
				at = bytes.LastIndexByte(b[:it.Node().Raw.Offset], '\n') + 1
			}
		}
		e := expression{kind: n.Kind, at: at}
		if n.Kind == unstable.KeyValue {
			e.table, e.key = table, key
			if v := n.Value(); v.Kind == unstable.String {
				e.value = [2]int{int(v.Raw.Offset), int(v.Raw.Offset + v.Raw.Length)}
			}
		} else {
			table = key
			e.table = key
		}
		es = append(es, e)
	}
	return doc, es, p.Error()
}

// newline is how the lines of b end.
func newline(b []byte) string {
	if i := bytes.IndexByte(b, '\n'); i > 0 && b[i-1] == '\r' {
		return "\r\n"
	}
	return "\n"
}

// insert puts lines, each ending in "\n", into b before the line at off, or at its
// end. They end as b's lines do.
func insert(b []byte, off int, lines, mark string) ([]byte, Edit) {
	nl := newline(b)
	text := strings.ReplaceAll(lines, "\n", nl)
	if off == len(b) && off > 0 && b[off-1] != '\n' {
		text = nl + text
	}
	return splice(b, off, off, text), Edit{New: text, Mark: mark}
}

func splice(b []byte, from, to int, text string) []byte {
	out := make([]byte, 0, len(b)+len(text))
	out = append(out, b[:from]...)
	out = append(out, text...)
	return append(out, b[to:]...)
}

// aboveComments returns where the comments begin that stand directly above the
// line at off: they belong to it.
func aboveComments(b []byte, off int) int {
	for off > 0 {
		start := bytes.LastIndexByte(b[:off-1], '\n') + 1
		if !bytes.HasPrefix(bytes.TrimSpace(b[start:off]), []byte("#")) {
			break
		}
		off = start
	}
	return off
}

// takeOut undoes edits in a text that was changed since by others. missing are
// those that are there no more as they were written, though their mark is.
func takeOut(b []byte, edits []Edit) (after []byte, missing []Edit) {
	var lost []Edit
	for _, e := range slices.Backward(edits) {
		at := bytes.Index(b, []byte(e.New))
		if at < 0 || bytes.Contains(b[at+1:], []byte(e.New)) {
			lost = append(lost, e)
			continue
		}
		end, old := at+len(e.New), e.Old
		if e.New[0] == '\r' || e.New[0] == '\n' { // it ended a last line without end, which is the last no more
			if nl := newline(b); end < len(b) {
				old += nl
			}
		}
		b = splice(b, at, end, old)
	}
	for _, e := range lost {
		if bytes.Contains(b, []byte(e.Mark)) {
			missing = append(missing, e)
		}
	}
	return b, missing
}

// means tells whether b, as TOML, is want.
func means(b []byte, want map[string]any) bool {
	got, _, err := parseTOML(b)
	return err == nil && reflect.DeepEqual(got, want)
}

// lookup returns what is at path in doc, nil for nothing.
func lookup(doc map[string]any, path ...string) any {
	var v any = doc
	for _, k := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[k]
	}
	return v
}

// put sets what is at path in doc and makes the tables on the way.
func put(doc map[string]any, value any, path ...string) {
	last := len(path) - 1
	for _, k := range path[:last] {
		m, ok := doc[k].(map[string]any)
		if !ok {
			m = map[string]any{}
			doc[k] = m
		}
		doc = m
	}
	doc[path[last]] = value
}
