package cli

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// Size makes a number of bytes the value of a flag, which may have a unit.
func Size(n *int64) pflag.Value { return (*size)(n) }

type size int64

// units from the largest on, so that String finds the shortest form.
var units = [...]struct {
	name  string
	bytes int64
}{
	{"TiB", 1 << 40},
	{"TB", 1e12},
	{"GiB", 1 << 30},
	{"GB", 1e9},
	{"MiB", 1 << 20},
	{"MB", 1e6},
	{"KiB", 1 << 10},
	{"KB", 1e3},
	{"B", 1},
}

// Set reads a size such as 4096, 512MiB or 10GB.
func (s *size) Set(text string) error {
	number, unit := strings.TrimSpace(text), int64(1)
	for _, u := range units {
		if cut, ok := strings.CutSuffix(number, u.name); ok {
			number, unit = strings.TrimSpace(cut), u.bytes
			break
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/unit {
		return fmt.Errorf("size %q: want bytes, or a whole number and KiB, MiB, GiB, TiB, KB, MB, GB or TB", text)
	}
	*s = size(n * unit)
	return nil
}

// String returns the size in the largest unit that it is a multiple of.
func (s *size) String() string {
	for _, u := range units {
		if n := int64(*s); n != 0 && n%u.bytes == 0 && u.bytes > 1 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(*s), 10)
}

// Type is what --help calls the value.
func (s *size) Type() string { return "size" }

// Rate makes a number of bits per second the value of a flag, which has a unit
// unless it is 0.
func Rate(n *int64) pflag.Value { return (*rate)(n) }

type rate int64

// rates from the largest on, so that String finds the shortest form.
var rates = [...]struct {
	name string
	bits int64
}{
	{"Tbit", 1e12},
	{"Gbit", 1e9},
	{"Mbit", 1e6},
	{"Kbit", 1e3},
	{"bit", 1},
}

// Set reads a rate such as 100Mbit or 10Gbit.
func (r *rate) Set(text string) error {
	for _, u := range rates {
		number, ok := strings.CutSuffix(strings.TrimSpace(text), u.name)
		if !ok {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64); err == nil && n >= 0 && n <= math.MaxInt64/u.bits {
			*r = rate(n * u.bits)
			return nil
		}
		break
	}
	if text == "0" {
		*r = 0
		return nil
	}
	return fmt.Errorf("rate %q: want a whole number and Kbit, Mbit, Gbit or Tbit, for so many bits a second", text)
}

// String returns the rate in the largest unit that it is a multiple of.
func (r *rate) String() string {
	for _, u := range rates {
		if n := int64(*r); n != 0 && n%u.bits == 0 {
			return strconv.FormatInt(n/u.bits, 10) + u.name
		}
	}
	return "0"
}

// Type is what --help calls the value.
func (r *rate) Type() string { return "rate" }
