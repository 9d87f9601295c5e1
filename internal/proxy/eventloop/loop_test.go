package eventloop

import (
	"net"
	"syscall"
	"testing"
	"time"
)

func TestGroupWithoutLoops(t *testing.T) {
	for name, g := range map[string]*Group{"nil": nil, "zero": {}} {
		if g.Len() != 0 || g.Conns() != 0 || g.Turns() != 0 || g.Pick() != nil {
			t.Errorf("%s: it has something", name)
		}
	}
	if err := (&Group{}).Close(0); err != nil {
		t.Error(err)
	}
}

func TestTableIsAsLargeAsDescriptorsCanBe(t *testing.T) {
	g := newGroup(t, 1)
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	if n := uint64(len(g.table)); n != min(files.Cur, MaxDescriptor) {
		t.Errorf("%d places for %d descriptors", n, files.Cur)
	}
}

func TestPickSpreads(t *testing.T) {
	const loops = 3
	g := newGroup(t, loops)
	times := [loops]int{}
	for range 10 * loops {
		times[g.Pick().Index()]++
	}
	if times != [loops]int{10, 10, 10} {
		t.Errorf("without connections, loops are picked %v times", times)
	}
	// One that has many more than another is not picked until that has caught up.
	for i, l := range g.loops {
		l.conns.Store([]int64{100, 100, 50}[i])
	}
	for range 30 {
		l := g.Pick()
		if l.Index() != 2 {
			t.Errorf("loop %d is picked with %d connections", l.Index(), l.conns.Load())
		}
		l.conns.Add(1)
	}
	times = [loops]int{}
	g.loops[2].conns.Store(95)
	for range 10 * loops {
		times[g.Pick().Index()]++
	}
	if times != [loops]int{10, 10, 10} {
		t.Errorf("with about as many connections, loops are picked %v times", times)
	}
	for _, l := range g.loops {
		l.conns.Store(0)
	}
}

func TestConnsCountsThoseOfAllLoops(t *testing.T) {
	g := newGroup(t, 2)
	var conns []*Conn
	for i := range 6 {
		c, _ := onLoop(t, g.loops[i%2], networks[i/3])
		conns = append(conns, c)
		if n := g.Conns(); n != int64(i+1) {
			t.Errorf("%d connections, want %d", n, i+1)
		}
	}
	for i, c := range conns {
		_ = c.Close()
		if n := g.Conns(); n != int64(len(conns)-i-1) {
			t.Errorf("%d connections, want %d", n, len(conns)-i-1)
		}
	}
}

func TestCloseWaitsForConnections(t *testing.T) {
	g, err := NewGroup(2)
	if err != nil {
		t.Fatal(err)
	}
	c, other := onLoop(t, g.Pick(), "tcp")
	e := &echo{c: c, closed: make(chan struct{})}
	c.Idle(e)
	ended := make(chan error, 1)
	go func() { ended <- g.Close(patience) }()
	until(t, g.over.Load)
	if g.Pick() != nil {
		t.Error("there is a loop to pick")
	}
	write(t, other, []byte("x")) // which it still does
	readFull(t, other, 1)
	select {
	case err := <-ended:
		t.Errorf("it ended with a connection: %v", err)
	default:
	}
	_ = other.Close()
	if err := await(t, ended); err != nil {
		t.Error(err)
	}
	await(t, e.closed)
}

func TestCloseWaitsNoLonger(t *testing.T) {
	sockets := descriptors(t, "anon_inode")
	g, err := NewGroup(2)
	if err != nil {
		t.Fatal(err)
	}
	if n := descriptors(t, "anon_inode"); n != sockets+4 {
		t.Errorf("two loops have %d descriptors", n-sockets)
	}
	c, _ := onLoop(t, g.Pick(), "tcp")
	c.Idle(starter(func(*Task) { t.Error("it begins on a loop that has ended") }))
	begun := time.Now()
	if err := g.Close(20 * time.Millisecond); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took < 20*time.Millisecond {
		t.Errorf("it waited for %v", took)
	}
	if n := descriptors(t, "anon_inode"); n != sockets {
		t.Errorf("%d descriptors are left", n-sockets)
	}
	_ = c.Close()
}

func TestLoopKeepsFewSpareTasks(t *testing.T) {
	const tasks = 2*maxSpare + 5
	g := newGroup(t, 1)
	l := g.Pick()
	waiting := make([]*Task, 0, tasks)
	var all []<-chan struct{}
	for range tasks {
		all = append(all, begin(l, func(task *Task) {
			waiting = append(waiting, task)
			task.Park()
		}))
	}
	settle(t, l)
	if len(waiting) != tasks {
		t.Fatalf("%d tasks wait", len(waiting))
	}
	for _, task := range waiting {
		task.Wake()
	}
	for _, done := range all {
		await(t, done)
	}
	spare := make(chan int, 1)
	settle(t, l)
	await(t, begin(l, func(*Task) { spare <- len(l.spare) }))
	if n := await(t, spare) + 1; n != maxSpare { // with the one that looks
		t.Errorf("%d tasks are kept, want %d", n, maxSpare)
	}
}

func TestSleepingLoopWakesForWhatIsPosted(t *testing.T) {
	// Posts come before it sleeps, while it falls asleep and while it sleeps.
	const rounds = 500
	g := newGroup(t, 2)
	for i := range rounds {
		l := g.loops[i%2]
		if i%50 == 0 {
			time.Sleep(shortSleep * 10) // likely to be asleep; nothing depends on it
		}
		await(t, begin(l, func(*Task) {}))
	}
}

func TestLoopHasManyEventsAtOnce(t *testing.T) {
	const conns = 2*maxEvents + 10
	g := newGroup(t, 1)
	l := g.Pick()
	told := make(chan begun, conns)
	others := make([]net.Conn, 0, conns)
	for range conns {
		c, other := onLoop(t, l, "unix")
		others = append(others, other)
		c.Idle(reads(c, told))
	}
	settle(t, l)
	held, hold := make(chan struct{}), make(chan struct{})
	begin(l, func(*Task) { close(held); <-hold }) // which stops the loop
	await(t, held)
	for _, other := range others {
		write(t, other, []byte("x"))
		_ = other.Close()
	}
	close(hold)
	for range conns {
		if is := await(t, told); is.got != "x" {
			t.Fatalf("%+v", is)
		}
	}
	if g.Turns() == 0 {
		t.Error("no turn was counted")
	}
}
