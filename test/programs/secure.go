//go:build linux

package programs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// Secured makes a region's authority in a directory that is not there yet, and
// returns the flags with which a supernode and the hosts have it.
func Secured(ctx context.Context, bin, dir string) (supernode, daemon string, err error) {
	token, err := exec.CommandContext(ctx, filepath.Join(bin, "supernode"), "ca", dir).Output()
	if err != nil {
		return "", "", fmt.Errorf("make an authority: %w", err)
	}
	file := filepath.Join(dir, "token")
	return "--ca=" + dir, "--join-token=" + file, os.WriteFile(file, token, 0o600)
}

// secured has what is started without a word of TLS be so as well, where
// DAMSELFLY_TEST_TLS says so: by one authority, for as long as the process lives.
var secured = sync.OnceValues(func() (string, error) {
	if os.Getenv("DAMSELFLY_TEST_TLS") == "" {
		return "", nil
	}
	return os.MkdirTemp("", "damselfly-ca-")
})

var making sync.Mutex

// withTLS adds to flags what secured wants.
func withTLS(ctx context.Context, bin, kind string, flags []string) ([]string, error) {
	dir, err := secured()
	if err != nil || dir == "" || isSecure(flags) {
		return flags, err
	}
	dir = filepath.Join(dir, "ca")
	supernode, daemon := "--ca="+dir, "--join-token="+filepath.Join(dir, "token")
	making.Lock()
	defer making.Unlock()
	if _, err := os.Stat(dir); err != nil {
		if supernode, daemon, err = Secured(ctx, bin, dir); err != nil {
			return nil, err
		}
	}
	return append(slices.Clip(flags), map[string]string{"supernode": supernode, "dfdaemon": daemon}[kind]), nil
}

// isSecure tells whether flags turn TLS on.
func isSecure(flags []string) bool {
	return slices.ContainsFunc(flags, func(f string) bool {
		return strings.HasPrefix(f, "--ca=") || strings.HasPrefix(f, "--tls=") || strings.HasPrefix(f, "--join-token=") ||
			strings.HasPrefix(f, "--clear-private")
	})
}
