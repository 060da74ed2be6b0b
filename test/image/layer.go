package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// packages are what the Debian root has beyond the smallest set.
const packages = "ca-certificates,git"

// stamp is the time of every file, so that the same files make the same layer.
var stamp = time.Unix(1_700_000_000, 0)

// A source is the files of one layer: those below root at paths, all where
// there are none, without what is at skip. They appear below prefix.
type source struct {
	root, prefix string
	paths, skip  []string
}

// write makes the layer, compressed fast, at path.
func (s source) write(ctx context.Context, path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	zip, err := gzip.NewWriterLevel(file, gzip.BestSpeed)
	if err != nil {
		return err
	}
	out := tar.NewWriter(zip)
	paths := s.paths
	if len(paths) == 0 {
		paths = []string{"."}
	}
	for _, p := range paths {
		err := filepath.WalkDir(filepath.Join(s.root, p), func(path string, entry fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			return s.add(out, path, entry)
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a Go tree may come without its tests
			return err
		}
	}
	return errors.Join(out.Close(), zip.Close(), file.Close())
}

// add appends one entry: directories, files and links, nothing else.
func (s source) add(out *tar.Writer, path string, entry fs.DirEntry) error {
	rel, err := filepath.Rel(s.root, path)
	if err != nil {
		return err
	}
	if slices.Contains(s.skip, rel) && entry.IsDir() {
		return fs.SkipDir
	}
	info, err := entry.Info()
	if err != nil {
		return err
	}
	link := ""
	switch info.Mode().Type() {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	default:
		return nil
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	header.Name = filepath.Join(s.prefix, rel)
	if entry.IsDir() {
		header.Name += "/"
	}
	header.ModTime, header.AccessTime, header.ChangeTime = stamp, time.Time{}, time.Time{}
	header.Uname, header.Gname, header.Format = "", "", tar.FormatPAX
	if err := out.WriteHeader(header); err != nil || header.Size == 0 {
		return err
	}
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	_, err = io.Copy(out, in)
	return err
}

// debootstrap makes a Debian root of this machine's own release below work,
// from where this machine has its packages.
func debootstrap(ctx context.Context, work string) (string, error) {
	mirror, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)",
		"Created-By: Packages", "Component: main").Output()
	if err != nil {
		return "", fmt.Errorf("ask apt where Debian's packages are: %w", err)
	}
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", fmt.Errorf("read this machine's release: %w", err)
	}
	for line := range strings.Lines(string(mirror)) {
		codename, uri, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !strings.Contains(string(release), "VERSION_CODENAME="+codename+"\n") {
			continue
		}
		root := filepath.Join(work, "root")
		cmd := exec.CommandContext(ctx, "debootstrap", "--variant=minbase", "--include="+packages, codename, root, uri) //nolint:gosec // G204: apt's own word
		if out, err := cmd.CombinedOutput(); err != nil {
			lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
			return "", fmt.Errorf("debootstrap: %w: %s", err, lines[len(lines)-1])
		}
		return root, nil
	}
	return "", errors.New("apt knows no source of this machine's own release")
}
