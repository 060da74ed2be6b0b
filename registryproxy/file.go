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

// File is what a small file says, read again when the file has changed.
type File[T any] struct {
	path  string
	parse func([]byte) (T, error)

	mu    sync.Mutex // guards what follows
	seen  os.FileInfo
	value T
}

// OpenFile reads a file of at most 1 MiB by parse, whose error quotes nothing of it.
func OpenFile[T any](path string, parse func([]byte) (T, error)) (*File[T], error) {
	f := &File[T]{path: path, parse: parse}
	_, err := f.Get()
	return f, err
}

// Get returns what the file says, and with an error what it said before, but
// nothing where it is gone or was never right. That its words are wrong is an
// error once for each change; that it cannot be read, each time.
func (f *File[T]) Get() (T, error) {
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
