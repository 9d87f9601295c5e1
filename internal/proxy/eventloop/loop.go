package eventloop

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// MaxDescriptor bounds the descriptors that a loop takes, which stand in a table of
	// as many pointers; it takes none that is larger.
	MaxDescriptor = 1 << 19
	// maxEvents is how many events are taken from the kernel at once.
	maxEvents = 256
	// shortSleep is how long a loop without events keeps its place with the scheduler,
	// if it does not hold it.
	shortSleep = 20 * time.Microsecond
	// BusyTurns is from how many turns a second on a loop is busy.
	BusyTurns = 2000
	// rushTurns is after how many turns it is looked at how many that is a second.
	rushTurns = 64
	// maxSpare is how many tasks without work a loop keeps, with their stacks.
	maxSpare = 64
)

// A Group is a number of loops. Its zero value has none, and a nil Group neither.
type Group struct {
	loops []*Loop
	next  atomic.Uint32
	table []atomic.Pointer[Conn] // by descriptor; of all loops
	gen   atomic.Int32           // of the Conn that joined last
	over  atomic.Bool
	holds atomic.Bool
	rush  chan struct{} // has room for one
}

// NewGroup starts n loops. Close ends them.
func NewGroup(n int) (*Group, error) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return nil, fmt.Errorf("the limit of open files: %w", err)
	}
	g := &Group{table: make([]atomic.Pointer[Conn], min(files.Cur, MaxDescriptor)), rush: make(chan struct{}, 1)}
	for i := range n {
		l := &Loop{group: g, index: i, ended: make(chan struct{})}
		if err := l.open(); err != nil {
			return nil, errors.Join(err, g.Close(0))
		}
		g.loops = append(g.loops, l)
		go l.run()
	}
	return g, nil
}

// Close ends the loops once they have no connections, or that long after it was
// called, and waits for that. Whoever still needs a loop then waits for ever. From
// the beginning of Close on there is no loop to Pick.
func (g *Group) Close(within time.Duration) error {
	g.over.Store(true)
	for end := time.Now().Add(within); g.Conns() > 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	var err error
	for _, l := range g.loops {
		l.post(job{})
		<-l.ended
		err = errors.Join(err, syscall.Close(l.ep), syscall.Close(l.bell))
	}
	return err
}

// Len returns how many loops there are.
func (g *Group) Len() int {
	if g == nil {
		return 0
	}
	return len(g.loops)
}

// Conns returns how many connections the loops have.
func (g *Group) Conns() (n int64) {
	if g != nil {
		for _, l := range g.loops {
			n += l.conns.Load()
		}
	}
	return n
}

// Hold has the loops keep their places with the scheduler (see runtime.GOMAXPROCS)
// while they sleep, until the runtime takes them back, which is after ten milliseconds
// or so, and at once to stop the world. There have to be as many places more for
// all else. It is for loops that are busy: their sleeps are short then, and a timer to
// end each would cost more than they do.
func (g *Group) Hold(is bool) { g.holds.Store(is) }

// Rush tells that a loop which does not hold its place has begun to be busy.
func (g *Group) Rush() <-chan struct{} {
	if g == nil {
		return nil
	}
	return g.rush
}

// Turns counts how often a loop has found something to do without leaving its place
// with the scheduler to others.
func (g *Group) Turns() (n int64) {
	if g != nil {
		for _, l := range g.loops {
			n += l.turns.Load()
		}
	}
	return n
}

// Pick returns the loop for another connection: in turn, but never one with many
// more than another. It returns nil if there are none.
func (g *Group) Pick() *Loop {
	if g.Len() == 0 || g.over.Load() {
		return nil
	}
	best := g.loops[int(g.next.Add(1))%len(g.loops)]
	for _, l := range g.loops {
		if l.conns.Load()+l.conns.Load()/8 < best.conns.Load() {
			best = l
		}
	}
	return best
}

// A Loop serves its connections by one goroutine.
type Loop struct {
	group *Group
	index int
	ep    int // epoll
	bell  int // eventfd, rung for what is posted to a loop that sleeps
	conns atomic.Int64
	turns atomic.Int64 // polls that found something without leaving its place
	ended chan struct{}

	asleep atomic.Bool
	mu     sync.Mutex
	posted []job // guarded by mu

	// Of the loop's goroutine.
	clock  time.Time // of the last look
	due    []job
	spare  []*Task
	lately int       // turns since
	since  time.Time // this
	events [maxEvents]unix.EpollEvent
}

// job is what a loop is to do: go on with a task, or begin on a connection, or, if
// it is neither, end.
type job struct {
	task  *Task
	begin Starter
}

// Index returns the loop's number in its group, from 0.
func (l *Loop) Index() int { return l.index }

func (l *Loop) open() (err error) {
	if l.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("an epoll instance: %w", err)
	}
	if l.bell, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return errors.Join(fmt.Errorf("an eventfd: %w", err), syscall.Close(l.ep))
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(l.bell)} //nolint:gosec // a descriptor
	if err := unix.EpollCtl(l.ep, unix.EPOLL_CTL_ADD, l.bell, &ev); err != nil {
		return errors.Join(fmt.Errorf("an eventfd in epoll: %w", err), syscall.Close(l.bell), syscall.Close(l.ep))
	}
	return nil
}

// Begin has the loop begin s soon, on a task. It may be called from anywhere.
func (l *Loop) Begin(s Starter) { l.post(job{begin: s}) }

// post has the loop do j soon. It may be called from anywhere.
func (l *Loop) post(j job) {
	l.mu.Lock()
	l.posted = append(l.posted, j)
	l.mu.Unlock()
	if l.asleep.Swap(false) {
		var one [8]byte
		binary.NativeEndian.PutUint64(one[:], 1)
		_, _ = syscall.Write(l.bell, one[:]) // nobody has to read it: it counts to more than there is time for
	}
}

// take moves what was posted to due, and reports whether there is something to do.
func (l *Loop) take() bool {
	l.mu.Lock()
	l.due = append(l.due, l.posted...)
	clear(l.posted)
	l.posted = l.posted[:0]
	l.mu.Unlock()
	return len(l.due) > 0
}

// run is the loop.
func (l *Loop) run() {
	defer close(l.ended)
	l.clock = time.Now()
	for {
		// What is posted meanwhile is done after the next look at the connections.
		for i, busy := 0, l.take(); busy && i < len(l.due); i++ {
			j := l.due[i]
			l.due[i] = job{}
			switch {
			case j.task != nil:
				l.resume(j.task)
			case j.begin != nil:
				l.begin(j.begin)
			default:
				for _, t := range l.spare {
					t.end()
				}
				return
			}
		}
		l.due = l.due[:0]
		n := l.poll()
		l.clock = time.Now()
		for _, ev := range l.events[:n] {
			if int(ev.Fd) == l.bell {
				continue // it was rung for what take finds
			}
			if c := l.group.table[ev.Fd].Load(); c != nil {
				c.happened(l, ev.Events, ev.Pad)
			}
		}
	}
}

// poll waits for events, unless something is posted, and returns how many there are.
func (l *Loop) poll() int {
	l.asleep.Store(true)
	defer l.asleep.Store(false)
	l.mu.Lock()
	due := len(l.posted) > 0
	l.mu.Unlock()
	// First without telling the scheduler. A busy loop need not, and shortSleep is no
	// longer than the scheduler would leave it its place anyway.
	var n int
	switch {
	case due:
		n = l.turn(0)
	case l.group.holds.Load():
		n = l.turn(-1)
	default:
		n = l.shortTurn()
	}
	if n > 0 || due {
		return n
	}
	// A raw call may have been ended by a signal of the runtime, which wants its place.
	forever := -1
	events, _, errno := syscall.Syscall6(syscall.SYS_EPOLL_PWAIT, uintptr(l.ep), uintptr(unsafe.Pointer(&l.events)), maxEvents, uintptr(forever), 0, 0)
	if errno != 0 {
		return 0 // a signal
	}
	return int(events)
}

// turn waits for events, without telling the scheduler: not at all, for 0, or until
// there is one or a signal, for -1.
func (l *Loop) turn(long int) int {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_PWAIT, uintptr(l.ep), uintptr(unsafe.Pointer(&l.events)), maxEvents, uintptr(long), 0, 0)
	return l.turned(n, errno)
}

// shortTurn waits for events for shortSleep, without telling the scheduler. A kernel
// that lacks the call, before Linux 5.11, has none.
func (l *Loop) shortTurn() int {
	long := unix.Timespec{Nsec: int64(shortSleep)}
	n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT2, uintptr(l.ep), uintptr(unsafe.Pointer(&l.events)), maxEvents, uintptr(unsafe.Pointer(&long)), 0, 0)
	return l.turned(n, errno)
}

func (l *Loop) turned(n uintptr, errno syscall.Errno) int {
	if errno != 0 || n == 0 {
		return 0
	}
	l.turns.Add(1)
	if l.lately++; l.lately >= rushTurns {
		l.lookForRush()
	}
	return int(n)
}

// lookForRush is after rushTurns turns.
func (l *Loop) lookForRush() {
	now := time.Now()
	took := now.Sub(l.since)
	l.lately, l.since = 0, now
	if took <= rushTurns*time.Second/BusyTurns && !l.group.holds.Load() {
		select {
		case l.group.rush <- struct{}{}:
		default:
		}
	}
}

// begin starts a task for s.
func (l *Loop) begin(s Starter) {
	var t *Task
	if n := len(l.spare) - 1; n >= 0 {
		t = l.spare[n]
		l.spare[n] = nil
		l.spare = l.spare[:n]
	} else {
		t = newTask(l)
	}
	t.work, t.attached, t.steps = s, true, 0
	l.resume(t)
}

// resume goes on with t until it parks, leaves the loop or has done its work.
func (l *Loop) resume(t *Task) {
	t.next()
	switch t.said {
	case saidParked, saidBack: // the second is drive's
	case saidLeft:
		go t.drive()
	case saidDone:
		if len(l.spare) < maxSpare {
			l.spare = append(l.spare, t)
		} else {
			t.end() // runs it to its end
		}
	}
}
