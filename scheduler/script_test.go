package scheduler

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"damselfly.dev/pieces"
)

var rewrite = flag.Bool("rewrite", false, "write what the scripts in testdata give into them")

// TestScripts runs the scripts in testdata. A script is made of paragraphs:
// commands, a line of dashes, and what the scheduler decided. The commands:
//
//	rule           the zone rule is on; before the first host
//	host ID [up=N] [down=N] [zone=Z] [rack=R] [seed] [new]; but for new ones they have sent a piece before
//	down ID
//	task ID PIECES
//	drop TASK
//	join|hold|have|lost|want HOST TASK [none|all|FIRST-LAST]
//	leave HOST TASK
//	done #TRANSFER [PIECE] [as=HOST]
//	soon #TRANSFER [as=HOST]
//	fail #TRANSFER busy|gone|corrupt|cancelled [RETRY] [as=HOST]
//	play COUNT     the COUNT oldest transfers that may begin come to their end
//	wait DURATION
//	tick DURATION  Tick every 100 ms for so long
//	show           hosts, with what they have and what they have under way
//
// Transfers are numbered as they appear. As the host that reports, the child of
// the transfer is taken.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := runScript(t, string(b))
			if *rewrite {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got != string(b) {
				t.Errorf("%s gives (see -rewrite):\n%s", file, got)
			}
		})
	}
}

func runScript(t *testing.T, text string) string {
	t.Helper()
	r := &script{
		s: New(DefaultConfig(), rand.New(rand.NewPCG(1, 1))), now: time.Unix(0, 0),
		number: map[TransferID]int{}, sizes: map[TaskID]int{},
	}
	var out strings.Builder
	for paragraph := range strings.SplitSeq(strings.TrimSpace(text), "\n\n") {
		commands, _, _ := strings.Cut(paragraph, "\n----")
		fmt.Fprintf(&out, "%s\n", commands)
		r.out.Reset()
		for line := range strings.SplitSeq(commands, "\n") {
			if words := strings.Fields(line); len(words) > 0 && words[0] != "#" {
				if err := r.command(words[0], words[1:]); err != nil {
					t.Fatalf("%s: %v", line, err)
				}
			}
		}
		r.decisions()
		if err := check(r.s); err != nil {
			t.Fatalf("after %s:\n%v", commands, err)
		}
		if strings.TrimSpace(commands) != "" && !onlyComments(commands) {
			fmt.Fprintf(&out, "----\n%s", r.out.String())
		}
		fmt.Fprintln(&out)
	}
	return strings.TrimRight(out.String(), "\n") + "\n"
}

func onlyComments(text string) bool {
	for line := range strings.SplitSeq(text, "\n") {
		if !strings.HasPrefix(line, "# ") {
			return false
		}
	}
	return true
}

type script struct {
	s      *Scheduler
	now    time.Time
	out    strings.Builder
	number map[TransferID]int
	told   []Decision // by number - 1
	open   []int      // numbers of transfers that have not ended
	sizes  map[TaskID]int
}

// decisions prints what was decided since the last time.
func (r *script) decisions() {
	for _, d := range r.s.Decisions() {
		if d.Kind == Cancel {
			n := r.number[d.Transfer]
			r.open = slices.DeleteFunc(r.open, func(o int) bool { return o == n })
			fmt.Fprintf(&r.out, "#%d cancelled\n", n)
			continue
		}
		r.told = append(r.told, d)
		n := len(r.told)
		r.number[d.Transfer] = n
		r.open = append(r.open, n)
		fmt.Fprintf(&r.out, "#%d %d <- %d task %d: %s", n, d.Host, d.Parent, d.Task, span(d.First, d.Count))
		if d.Crosses {
			fmt.Fprintf(&r.out, " crossing")
		}
		fmt.Fprintln(&r.out)
	}
}

func span(first, count int) string {
	if count == 1 {
		return strconv.Itoa(first)
	}
	return fmt.Sprintf("%d-%d", first, first+count-1)
}

// command runs one line of a script.
func (r *script) command(name string, args []string) error {
	option := map[string]string{}
	args = slices.DeleteFunc(slices.Clone(args), func(a string) bool {
		key, value, ok := strings.Cut(a, "=")
		if ok {
			option[key] = value
		}
		return ok
	})
	num := func(i int) int {
		n, err := strconv.Atoi(strings.TrimPrefix(args[i], "#"))
		if err != nil {
			panic(err)
		}
		return n
	}
	s := r.s
	switch name {
	case "rule":
		s.cfg.CrossOnce = true
	case "host":
		up, _ := strconv.Atoi(option["up"])
		down, _ := strconv.Atoi(option["down"])
		s.HostUp(r.now, HostID(num(0)), Host{Up: up, Down: down, Zone: option["zone"], Rack: option["rack"], Seed: slices.Contains(args, "seed")})
		if !slices.Contains(args, "new") {
			s.hosts[HostID(num(0))].shown = 1
		}
	case "down":
		s.HostDown(r.now, HostID(num(0)))
	case "task":
		r.sizes[TaskID(num(0))] = num(1)
		s.TaskAdd(r.now, TaskID(num(0)), pieces.Layout{Length: int64(num(1)) * pieces.MinPieceSize, PieceSize: pieces.MinPieceSize})
	case "drop":
		s.TaskRemove(r.now, TaskID(num(0)))
	case "leave":
		s.Leave(r.now, HostID(num(0)), TaskID(num(1)))
	case "join", "lazy", "hold", "given", "have", "lost", "want":
		r.have(name, HostID(num(0)), TaskID(num(1)), append(args, "none")[2])
	case "done", "fail", "soon":
		r.decisions()
		return r.report(name, num(0), args[1:], option["as"])
	case "play":
		return r.play(num(0))
	case "wait", "tick":
		d, err := time.ParseDuration(args[0])
		if err != nil {
			return err
		}
		for until := r.now.Add(d); r.now.Before(until); {
			r.now = r.now.Add(min(100*time.Millisecond, until.Sub(r.now)))
			if name == "tick" {
				s.Tick(r.now)
				r.decisions()
			}
		}
	case "show":
		r.decisions()
		r.show()
	default:
		return fmt.Errorf("no such command")
	}
	return nil
}

func (r *script) have(name string, host HostID, task TaskID, which string) {
	set := pieces.NewSet(r.sizes[task])
	first, last := 0, r.sizes[task]-1
	if a, b, ok := strings.Cut(which, "-"); ok {
		first, _ = strconv.Atoi(a)
		last, _ = strconv.Atoi(b)
	} else if n, err := strconv.Atoi(which); err == nil {
		first, last = n, n
	}
	for i := first; which != "none" && i <= last; i++ {
		set.Add(i)
	}
	switch name {
	case "join":
		r.s.Join(r.now, host, task, set)
	case "hold":
		r.s.Hold(r.now, host, task, set)
	case "given":
		r.s.Given(r.now, host, task, set)
	case "lazy":
		r.s.JoinLazy(r.now, host, task, set)
	case "have":
		r.s.Have(r.now, host, task, first, last-first+1)
	case "lost":
		r.s.Lost(r.now, host, task, first, last-first+1)
	case "want":
		r.s.Want(r.now, host, task, Run{first, set.Len()})
	}
}

func (r *script) report(name string, n int, args []string, as string) error {
	if n < 1 || n > len(r.told) {
		return fmt.Errorf("no such transfer")
	}
	d := r.told[n-1]
	host := d.Host
	if as != "" {
		id, err := strconv.Atoi(as)
		if err != nil {
			return err
		}
		host = HostID(id)
	}
	if name == "fail" {
		why := map[string]Failure{"busy": Busy, "gone": Gone, "corrupt": Corrupt, "cancelled": Cancelled}[args[0]]
		retry, _ := time.ParseDuration(append(args, "")[1])
		r.s.Failed(r.now, host, d.Transfer, why, retry)
		r.open = slices.DeleteFunc(r.open, func(o int) bool { return o == n })
		return nil
	}
	if name == "soon" {
		r.s.Soon(r.now, host, d.Transfer)
		return nil
	}
	first, count := d.First, d.Count
	if len(args) > 0 {
		piece, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		first, count = piece, 1
	}
	for i := range count {
		r.s.Done(r.now, host, d.Transfer, first+i, 0)
	}
	if r.s.find(d.Transfer) == nil {
		r.open = slices.DeleteFunc(r.open, func(o int) bool { return o == n })
	}
	return nil
}

// play lets transfers come to their end, the oldest first, 10 ms each.
func (r *script) play(count int) error {
	for range count {
		r.decisions()
		if len(r.open) == 0 {
			return nil
		}
		n := r.open[0]
		r.now = r.now.Add(10 * time.Millisecond)
		fmt.Fprintf(&r.out, "#%d done\n", n)
		if err := r.report("done", n, nil, ""); err != nil {
			return err
		}
	}
	return nil
}

// show prints the hosts in order.
func (r *script) show() {
	hosts := slices.SortedFunc(slices.Values(r.s.list), func(a, b *host) int { return int(a.id - b.id) })
	for _, h := range hosts {
		fmt.Fprintf(&r.out, "host %d: in %d out %d lent %d", h.id, h.in, h.out, h.lent)
		for _, p := range h.memberships() {
			fmt.Fprintf(&r.out, ", task %d has %d needs %d", p.task.id, p.has, p.needs)
		}
		if h.banned {
			fmt.Fprint(&r.out, ", banned")
		}
		if h.doubted && !h.banned {
			fmt.Fprint(&r.out, ", doubted")
		}
		if h.distrusted {
			fmt.Fprint(&r.out, ", distrusted")
		}
		fmt.Fprintln(&r.out)
	}
}
