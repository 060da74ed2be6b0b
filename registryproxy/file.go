package registryproxy

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"sync"
)

// maxFile is how large a file of certificates or credentials may be.
const maxFile = 1 << 20

// readFile reads a small file.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: name a file that this process can read", err)
	}
	defer func() { _ = f.Close() }() // it was only read
	var b bytes.Buffer
	if _, err := b.ReadFrom(io.LimitReader(f, maxFile+1)); err != nil {
		return nil, err
	}
	if b.Len() > maxFile {
		return nil, fmt.Errorf("%s is larger than 1 MiB", path)
	}
	return b.Bytes(), nil
}

// file is what a file says, read again when the file has changed.
type file[T any] struct {
	path  string
	parse func([]byte) (T, error) // its error quotes nothing of the file

	mu    sync.Mutex // guards what follows
	seen  os.FileInfo
	value T
}

// get returns what the file says. Where that cannot be read the error says so
// once for each change of the file, and the value is that of before; where the
// file is gone, or was never right, there is none.
func (f *file[T]) get() (T, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.path)
	if err != nil {
		var none T
		f.seen, f.value = nil, none
		return none, err
	}
	if f.seen != nil && os.SameFile(info, f.seen) && info.ModTime().Equal(f.seen.ModTime()) && info.Size() == f.seen.Size() {
		return f.value, nil
	}
	b, err := readFile(f.path)
	if err != nil {
		return f.value, err
	}
	f.seen = info
	v, err := f.parse(b)
	if err != nil {
		return f.value, fmt.Errorf("%s: %w", f.path, err)
	}
	f.value = v
	return v, nil
}

// File is a small file whose contents are read again when it changes.
type File[T any] struct{ file[T] }

// OpenFile reads a file by parse, whose error quotes nothing of it.
func OpenFile[T any](path string, parse func([]byte) (T, error)) (*File[T], error) {
	f := &File[T]{}
	f.path, f.parse = path, parse
	_, err := f.get()
	return f, err
}

// Get returns what the file says; with an error, what it said before.
func (f *File[T]) Get() (T, error) { return f.get() }
