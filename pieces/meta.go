package pieces

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
)

const (
	// maxNames bounds each list of names of a Meta. Forgetting the oldest is safe:
	// it costs its next asker one question to the origin.
	maxNames = 256
	// maxName bounds a public name and a media type, in bytes.
	maxName = 512
)

// Meta says what a task is. It is kept as JSON.
type Meta struct {
	ID        TaskID   `json:"id"`
	Layout    Layout   `json:"layout"`
	MediaType string   `json:"mediaType,omitempty"` // of a manifest, else empty
	Public    []string `json:"public,omitempty"`    // "registry/repository" names under which anyone may read it
	Origins   []string `json:"origins,omitempty"`   // who have themselves given these very bytes, as the owner of the store names them
	Window    bool     `json:"window,omitempty"`    // there is room for a part of it only: pieces come and go
	Complete  bool     `json:"complete,omitempty"`  // every piece present and the whole content's digest verified
}

func (m Meta) validate() error {
	if _, err := ParseTaskID(string(m.ID)); err != nil {
		return err
	}
	if err := m.Layout.Validate(); err != nil {
		return err
	}
	if len(m.MediaType) > maxName || len(m.Public) > maxNames || len(m.Origins) > maxNames ||
		slices.ContainsFunc(slices.Concat(m.Public, m.Origins), func(s string) bool { return len(s) > maxName }) {
		return errors.New("media type or names are too long")
	}
	return nil
}

func parseMeta(b []byte) (Meta, error) {
	var m Meta
	if err := json.Unmarshal(b, &m); err != nil {
		return Meta{}, err
	}
	return m, m.validate()
}

// taskDir returns the name of a task's directory.
func taskDir(id TaskID) string { return strings.Replace(string(id), ":", "-", 1) }

// dirTask returns the task whose directory has that name, if any.
func dirTask(name string) (TaskID, bool) {
	id, err := ParseTaskID(strings.Replace(name, "-", ":", 1))
	return id, err == nil && taskDir(id) == name
}

// withName returns names with one more at their end, at most maxNames of them.
func withName(names []string, name string) []string {
	if slices.Contains(names, name) {
		return names
	}
	names = append(names, name)
	return names[max(0, len(names)-maxNames):]
}
