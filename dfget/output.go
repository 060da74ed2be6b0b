package dfget

import (
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// output is a file that appears under its name when it is whole.
type output struct {
	path string
	temp *os.File // nil when it is no more
	err  error    // of writing
}

// newOutput begins the file at path, beside which it grows.
func newOutput(path string) (*output, error) {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	info, err := os.Lstat(path)
	if err == nil && !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "replace", Path: path, Err: errors.New("it is no regular file")}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	name := filepath.Join(filepath.Dir(path), ".dfget-"+rand.Text()+".part")
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666) //nolint:gosec // as the user's umask says
	if err != nil {
		return nil, err
	}
	return &output{path: path, temp: f}, nil
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.temp.Write(p)
	if err != nil {
		o.err = err
	}
	return n, err
}

// restart forgets what was written.
func (o *output) restart() error {
	_, err := o.temp.Seek(0, io.SeekStart)
	return errors.Join(err, o.temp.Truncate(0))
}

// commit gives the file its name.
func (o *output) commit() error {
	if err := o.temp.Sync(); err != nil {
		return err
	}
	name := o.temp.Name()
	if err := o.temp.Close(); err != nil {
		return err
	}
	if err := os.Rename(name, o.path); err != nil {
		return err
	}
	o.temp = nil
	dir, err := os.Open(filepath.Dir(o.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// discard removes what has no name yet.
func (o *output) discard() {
	if o.temp != nil {
		_ = o.temp.Close()
		_ = os.Remove(o.temp.Name())
	}
}
