package setup

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

const mirrorsKey = "registry-mirrors"

// mirrorList is where dockerd's mirrors stand in its daemon.json; offsets are
// in the text.
type mirrorList struct {
	open    int      // behind the object's brace
	empty   bool     // the object has no member
	found   bool     // it has the list
	key     int      // where the list's key begins
	inside  int      // behind the list's bracket
	end     int      // behind the list
	values  []string // of the list
	offsets [][2]int // where each stands
}

// readMirrors finds the list in a text.
func readMirrors(b []byte) (l mirrorList, err error) {
	wrong := func(err error) (mirrorList, error) {
		return l, fmt.Errorf("dockerd cannot read it: %w; mend it, or move it away", err)
	}
	if !utf8.Valid(b) {
		return wrong(errors.New("it is not UTF-8"))
	}
	if err := json.Unmarshal(b, &map[string]json.RawMessage{}); err != nil { // also what follows the object
		if e, ok := errors.AsType[*json.SyntaxError](err); ok {
			err = fmt.Errorf("line %d: %w", 1+bytes.Count(b[:min(int(e.Offset), len(b))], []byte("\n")), err)
		}
		return wrong(err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return wrong(errors.New("it is no object"))
	}
	l.open = int(d.InputOffset())
	l.empty = !d.More()
	for d.More() {
		before := int(d.InputOffset())
		name, err := d.Token()
		if err != nil {
			return wrong(err)
		}
		var value json.RawMessage
		behind := int(d.InputOffset())
		if err := d.Decode(&value); err != nil {
			return wrong(err)
		}
		if name != mirrorsKey {
			continue
		}
		if l.found {
			return wrong(errors.New(mirrorsKey + " is there twice"))
		}
		l.found, l.end = true, int(d.InputOffset())
		l.key = before + bytes.IndexByte(b[before:behind], '"')
		if err := l.read(value, l.end-len(value)); err != nil {
			return wrong(err)
		}
	}
	return l, nil
}

// read takes in the list itself, which begins at off.
func (l *mirrorList) read(list json.RawMessage, off int) error {
	if list[0] != '[' || json.Unmarshal(list, &l.values) != nil {
		return errors.New(mirrorsKey + " is no list of URLs")
	}
	d := json.NewDecoder(bytes.NewReader(list))
	_, _ = d.Token() // the bracket: the list is one
	l.inside = off + int(d.InputOffset())
	for d.More() {
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return err
		}
		end := off + int(d.InputOffset())
		l.offsets = append(l.offsets, [2]int{end - len(value), end})
	}
	return nil
}

// has returns the index of a mirror, -1 where it is not.
func (l *mirrorList) has(mirror string) int {
	for i, v := range l.values {
		if strings.TrimSuffix(v, "/") == mirror {
			return i
		}
	}
	return -1
}

// editDaemon makes mirror, a URL, the first of dockerd's mirrors. There are no
// edits where it was one already. An edit that names the list's key has made the
// list too.
func editDaemon(b []byte, mirror string) ([]byte, []Edit, error) {
	member := fmt.Sprintf("%q: [%q]", mirrorsKey, mirror)
	if len(bytes.TrimSpace(b)) == 0 {
		text := "{\n  " + member + "\n}\n"
		return []byte(text), []Edit{{Old: string(b), New: text, Mark: mirror}}, nil
	}
	l, err := readMirrors(b)
	if err != nil {
		return nil, nil, err
	}
	if l.has(mirror) >= 0 {
		return b, nil, nil
	}
	at, text := l.open, member
	if l.found {
		at, text = l.inside, fmt.Sprintf("%q", mirror)
	}
	space := string(b[at : at+len(b[at:])-len(bytes.TrimLeft(b[at:], " \t\r\n"))]) // before what comes first now
	if alone := !l.found && l.empty || l.found && len(l.values) == 0; !alone {
		text += ","
		if space == "" {
			text += " "
		}
		text = space + text
	}
	after := splice(b, at, at, text)
	if got, err := readMirrors(after); err != nil || got.has(mirror) != 0 {
		return nil, nil, errors.New("no mirror fits in: mend it, or move it away")
	}
	return after, []Edit{{New: text, Mark: mirror}}, nil
}

// takeOutMirror removes mirror from a daemon.json that others have changed since,
// and with it the list where we have made it and it would stay empty.
func takeOutMirror(b []byte, mirror string, made bool) ([]byte, error) {
	if len(bytes.TrimSpace(b)) == 0 {
		return b, nil
	}
	l, err := readMirrors(b)
	if err != nil {
		return nil, err
	}
	i := l.has(mirror)
	if i < 0 {
		return b, nil
	}
	from, to := l.offsets[i][0], l.offsets[i][1]
	if made && len(l.values) == 1 {
		from, to = l.key, l.end
	}
	from, to = withComma(b, from, to)
	return splice(b, from, to, ""), nil
}

// withComma widens a stretch of a list to the comma behind it and the space up to
// the next, else to the comma before it.
func withComma(b []byte, from, to int) (int, int) {
	const space = " \t\r\n"
	if rest := bytes.TrimLeft(b[to:], space); len(rest) > 0 && rest[0] == ',' {
		return from, len(b) - len(bytes.TrimLeft(rest[1:], space))
	}
	if head := bytes.TrimRight(b[:from], space); len(head) > 0 && head[len(head)-1] == ',' {
		return len(head) - 1, to
	}
	return from, to
}
