//go:build linux

package programs

import "context"

// Sent is the daemon's own count of the bytes it has sent to other hosts.
func (d *Daemon) Sent(ctx context.Context) (int64, error) {
	return d.value(ctx, "damselfly_sent_bytes_total")
}

// Goroutines is the program's own count of its goroutines.
func (s *server) Goroutines(ctx context.Context) (int64, error) {
	return s.value(ctx, "go_goroutines")
}
