package cmd_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// What each command must not link, with all below it. The linter sees what a
// package imports, and not what that imports.
func TestCommandsAreLean(t *testing.T) {
	everywhere := []string{"testing", "net/http/pprof", "github.com/stretchr/testify", "github.com/ugorji/go", "damselfly.dev/test"}
	for command, never := range map[string][]string{
		"supernode": {"damselfly.dev/dfget", "damselfly.dev/dfdaemon"},
		"dfdaemon":  {"damselfly.dev/supernode", "damselfly.dev/scheduler"},
		"dfget": {
			"damselfly.dev/supernode", "damselfly.dev/scheduler", "damselfly.dev/dfdaemon", "damselfly.dev/registryproxy",
			"github.com/gin-gonic/gin", "github.com/docker/distribution", "github.com/quic-go",
		},
	} {
		t.Run(command, func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-tags", "nomsgpack", "./"+command).Output()
			require.NoError(t, err)
			linked := strings.Fields(string(out))
			require.Contains(t, linked, "damselfly.dev/cmd/"+command)
			for _, p := range slices.Concat(everywhere, never) {
				within := func(l string) bool {
					return l == p || strings.HasPrefix(l, p+"/") && !strings.HasPrefix(l, "damselfly.dev/supernode/api")
				}
				if i := slices.IndexFunc(linked, within); i >= 0 {
					t.Errorf("%s links %s", command, linked[i])
				}
			}
		})
	}
}
