package dfget

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

const (
	maxHost  = 64 // bytes of a host's id
	hostFile = "host"
)

// hostID returns the id kept in the store's directory, or makes one and keeps it.
func hostID(dir string) (string, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", fmt.Errorf("host id: %w", err)
	}
	defer func() { _ = root.Close() }()
	b, err := root.ReadFile(hostFile)
	if id := strings.TrimSpace(string(b)); err == nil && id != "" && len(id) <= maxHost {
		return id, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("host id: %w", err)
	}
	id := rand.Text()
	const temp = "tmp-" + hostFile // what a kill leaves of it is swept with the store's own
	if err := root.WriteFile(temp, []byte(id+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("keep the host id: %w", err)
	}
	if err := root.Rename(temp, hostFile); err != nil {
		return "", fmt.Errorf("keep the host id: %w", err)
	}
	return id, nil
}
