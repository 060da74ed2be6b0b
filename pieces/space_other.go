//go:build !linux

package pieces

import (
	"errors"
	"os"
)

func diskSpace(string) (free, total int64, err error) { return 0, 0, errors.ErrUnsupported }

func punch(*os.File, int64, int64) error { return errors.ErrUnsupported }
