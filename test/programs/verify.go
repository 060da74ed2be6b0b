//go:build linux

package programs

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Verify reads a directory of files named by their sha256, as the engines'
// stores are, and returns an error unless every content is there, in its full
// size and with its digest right.
func Verify(dir string, contents []v1.Descriptor) error {
	for _, c := range contents {
		if err := verifyFile(filepath.Join(dir, c.Digest.Hex), c); err != nil {
			return err
		}
	}
	return nil
}

func verifyFile(path string, want v1.Descriptor) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("verify %s: %w", want.Digest, err)
	}
	defer file.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, file)
	if err != nil {
		return fmt.Errorf("verify %s: %w", want.Digest, err)
	}
	if got := hex.EncodeToString(hash.Sum(nil)); n != want.Size || got != want.Digest.Hex {
		return fmt.Errorf("verify %s: the store has %d bytes in place of %d, of digest %s", want.Digest, n, want.Size, got)
	}
	return nil
}
