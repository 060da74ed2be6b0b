package scheduler

import "time"

// rate estimates how long a lane takes for a byte, in nanoseconds; 0 is not
// known yet.
type rate float64

// best moves r quickly towards faster and slowly towards slower, so that it
// tells what a host can do: one slow partner does not make the host slow.
func (r *rate) best(seen rate) {
	switch {
	case *r == 0:
		*r = seen
	case seen < *r:
		*r += (seen - *r) / 2
	default:
		*r += (seen - *r) / 8
	}
}

// of returns the time for so many bytes.
func (r rate) of(bytes int64) time.Duration { return time.Duration(float64(r) * float64(bytes)) }
