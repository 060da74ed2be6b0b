package supernode

import (
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
)

// Contents without a length leave of the disk what the store leaves.
func TestSpoolsKeepFree(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	require.NoError(t, err)
	defer func() { _ = f.Close() }()
	var disk syscall.Statfs_t
	require.NoError(t, syscall.Fstatfs(int(f.Fd()), &disk))
	free, total := int64(disk.Bavail)*int64(disk.Bsize), int64(disk.Blocks)*int64(disk.Bsize) //nolint:unconvert // as room has it
	keep := min(free, total) / 4
	o := &origin{}
	o.spooling.Store(free - keep/2)
	_, err = o.room(&spooled{File: f, all: &o.spooling})
	require.NoError(t, err)
	o.keepFree = keep
	_, err = o.room(&spooled{File: f, all: &o.spooling})
	require.ErrorIs(t, err, pieces.ErrQuota)
}
