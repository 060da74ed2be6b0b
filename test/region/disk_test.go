package region_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/stretchr/testify/require"

	"damselfly.dev/dfdaemon"
)

// pushLarge puts an image of 52 MiB into the registry.
func pushLarge(t *testing.T, o *origin) string {
	t.Helper()
	var img v1.Image
	var err error
	img, err = random.Image(1, 0)
	require.NoError(t, err)
	for _, size := range []int64{32 << 20, 20 << 20} {
		l, err := random.Layer(size, "application/vnd.docker.image.rootfs.diff.tar.gzip")
		require.NoError(t, err)
		img, err = mutate.AppendLayers(img, l)
		require.NoError(t, err)
	}
	write(t, o.URL, img)
	o.set(func() { clear(o.gets); o.sent = 0 })
	return "org/app:v1"
}

// pullWithoutRoom has hosts pull an image that their disks do not hold, and a
// host with room after them: all of it comes from the region, and they give what
// they hold.
func pullWithoutRoom(t *testing.T, small func(i int) func(*dfdaemon.Config)) {
	t.Helper()
	o := newOrigin(t)
	image := pushLarge(t, o)
	centre := startSupernode(t, o, t.TempDir(), "")
	hosts := make([]*node, 2)
	for i := range hosts {
		hosts[i] = startHostFor(t, registries(o), centre, nil, small(i))
	}
	pullAll(t, hosts, image)
	pullAll(t, hosts, image) // what is there now is not what comes first
	large := startHost(t, o, centre, nil)
	require.NoError(t, pull(t.Context(), large, image))
	var sent float64
	for _, h := range hosts {
		require.Zero(t, h.value(t, "damselfly_received_bytes_total", "origin"))
		require.Positive(t, h.value(t, "damselfly_cache_dropped_total", ""))
		sent += h.value(t, "damselfly_sent_bytes_total", "")
	}
	require.Positive(t, sent)
	require.Zero(t, large.value(t, "damselfly_received_bytes_total", "origin"))
	requireOnce(t, o, centre)
}

func TestAnImageLargerThanTheQuota(t *testing.T) {
	pullWithoutRoom(t, func(int) func(*dfdaemon.Config) {
		return func(c *dfdaemon.Config) { c.Quota, c.KeepFree = 24<<20, 0 }
	})
}

// TestAnImageLargerThanTheDisk fills real disks, of which the store knows no
// bound: in a process of its own, whose mounts nobody else sees.
func TestAnImageLargerThanTheDisk(t *testing.T) {
	const inside = "REGION_TEST_DISKS"
	if os.Getenv(inside) == "" {
		if os.Geteuid() != 0 {
			if os.Getenv("CI") == "true" {
				t.Fatal("needs root to mount small disks")
			}
			t.Skip("SKIPPED: needs root to mount small disks")
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAnImageLargerThanTheDisk$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return
	}
	require.NoError(t, syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	pullWithoutRoom(t, func(int) func(*dfdaemon.Config) {
		dir := t.TempDir()
		require.NoError(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"))
		t.Cleanup(func() { require.NoError(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
		return func(c *dfdaemon.Config) { c.DataDir, c.Quota, c.KeepFree = dir, 0, 0 }
	})
}

// rot turns a bit in the middle of each content below dir.
func rot(t *testing.T, dir string) {
	t.Helper()
	n := 0
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "content" {
			return err
		}
		n++
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		var b [1]byte
		_, err = f.ReadAt(b[:], info.Size()/2)
		b[0] ^= 4
		_, werr := f.WriteAt(b[:], info.Size()/2)
		return errors.Join(err, werr, f.Close())
	}))
	require.Positive(t, n)
}

// TestRot: what has rotted on a host's disk, or on the supernode's, is given to
// nobody, and got anew.
func TestRot(t *testing.T) {
	o := newOrigin(t)
	image := push(t, o)
	centreDir, dir := t.TempDir(), t.TempDir()
	centre := startSupernode(t, o, centreDir, "")
	host := startHostFor(t, registries(o), centre, nil, func(c *dfdaemon.Config) { c.DataDir = dir })
	other := startHost(t, o, centre, nil)
	require.NoError(t, pull(t.Context(), host, image))
	require.Eventually(t, func() bool { // all is kept, and named as such
		return pull(t.Context(), host, image) == nil && host.value(t, "damselfly_received_bytes_total", "store") >= layers*layerSize
	}, waitLimit, waitTick)
	t.Run("read by the host's own engine", func(t *testing.T) {
		rot(t, dir)
		require.NoError(t, pull(t.Context(), host, image))
		require.Positive(t, host.value(t, "damselfly_cache_rotten_total", ""))
		require.Zero(t, host.value(t, "damselfly_received_bytes_total", "origin"))
		requireOnce(t, o, centre)
	})
	t.Run("asked for by another host", func(t *testing.T) {
		before := host.value(t, "damselfly_cache_rotten_total", "")
		rot(t, dir)
		require.NoError(t, pull(t.Context(), other, image))
		require.Zero(t, other.value(t, "damselfly_verify_failures_total", ""))
		require.Zero(t, other.value(t, "damselfly_received_bytes_total", "origin"))
		require.NoError(t, pull(t.Context(), host, image))
		require.Greater(t, host.value(t, "damselfly_cache_rotten_total", ""), before)
		requireOnce(t, o, centre)
	})
	t.Run("of the supernode", func(t *testing.T) {
		rot(t, filepath.Join(centreDir, "store"))
		require.NoError(t, pull(t.Context(), startHost(t, o, centre, nil), image))
	})
}
