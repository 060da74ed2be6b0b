package scheduler

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"damselfly.dev/pieces"
)

// Hosts that take and never end, whether they say that they soon will or not,
// hold up the others, but not for long: 20 hosts that need 40 ms for a piece.
func TestHostsThatNeverEnd(t *testing.T) {
	calm := crowdBeside(t, 0, 3, false)
	for _, soon := range []bool{false, true} {
		for _, lanes := range []int{3, MaxLanes} {
			t.Run(fmt.Sprintf("soon=%v,lanes=%d", soon, lanes), func(t *testing.T) {
				took := crowdBeside(t, 10, lanes, soon)
				t.Logf("the others end after %v, and %v without such hosts", took, calm)
				if took > 3*calm {
					t.Error("that is too long")
				}
			})
		}
	}
}

// crowdBeside returns how long 20 hosts take beside so many hostile ones.
func crowdBeside(t *testing.T, hostile, lanes int, soon bool) time.Duration {
	t.Helper()
	const honest, pieceTime = 20, 40 * time.Millisecond
	begin := time.Unix(0, 0)
	now := begin
	s := New(DefaultConfig(), rand.New(rand.NewPCG(1, 1)))
	l := pieces.Layout{Length: 256 * pieces.MinPieceSize, PieceSize: pieces.MinPieceSize}
	s.TaskAdd(now, 1, l)
	s.HostUp(now, 0, Host{Up: 3, Seed: true})
	s.Join(now, 0, 1, pieces.FullSet(l.Count()))
	for i := range hostile { // the first to come
		s.HostUp(now, HostID(100+i), Host{Down: lanes})
		s.Join(now, HostID(100+i), 1, pieces.NewSet(l.Count()))
	}
	for i := range honest {
		s.HostUp(now, HostID(1+i), Host{Up: 3, Down: 3})
		s.Join(now, HostID(1+i), 1, pieces.NewSet(l.Count()))
	}
	due := map[TransferID]time.Time{}
	order := []Decision{}
	lacking := honest * l.Count()
	for lacking > 0 {
		for told := s.Decisions(); len(told) > 0; told = s.Decisions() {
			for _, d := range append([]Decision(nil), told...) {
				switch {
				case d.Kind == Cancel:
					delete(due, d.Transfer)
				case d.Host < 100:
					due[d.Transfer] = now.Add(time.Duration(d.Count) * pieceTime)
					order = append(order, d)
				case soon:
					s.Soon(now, d.Host, d.Transfer)
				}
			}
		}
		now = now.Add(5 * time.Millisecond)
		rest := order[:0]
		for _, d := range order {
			at, open := due[d.Transfer]
			switch {
			case !open:
			case now.Before(at):
				rest = append(rest, d)
			default:
				delete(due, d.Transfer)
				for i := range d.Count {
					s.Done(now, d.Host, d.Transfer, d.First+i, 0)
					lacking--
				}
			}
		}
		order = rest
		if now.Sub(begin)%(100*time.Millisecond) == 0 {
			s.Tick(now)
		}
		if now.Sub(begin) > time.Minute {
			t.Fatalf("%d pieces are lacking after a minute", lacking)
		}
	}
	return now.Sub(begin)
}
