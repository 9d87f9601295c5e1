package eventloop

import (
	"iter"
	"time"
)

// A Starter is what a loop begins when a Conn that was left idle has something to
// read, has ended, or has come to its deadline.
type Starter interface {
	// Start works on t, of the loop unless it detaches. When it returns the
	// connection is closed or idle again.
	Start(t *Task)
}

// A Task is work on a loop's connections. Its methods are for the work itself, but
// Wake, which is for others.
type Task struct {
	loop     *Loop
	next     func() (struct{}, bool)
	end      func()
	yield    func(struct{}) bool
	work     Starter
	said     said // why it does not run
	attached bool // it runs on the loop's goroutine, or waits for it
	steps    int  // reads and writes since it last waited
}

type said uint8

const (
	saidParked said = iota
	saidLeft        // it wants a goroutine of its own
	saidBack        // it has one, and wants to come back
	saidDone
)

// fairShare is how many reads and writes a task may make while others wait.
const fairShare = 64

func newTask(l *Loop) *Task {
	t := &Task{loop: l}
	t.next, t.end = iter.Pull(func(yield func(struct{}) bool) {
		t.yield = yield
		for {
			t.work.Start(t)
			t.work = nil
			t.said = saidDone
			if !t.attached || !yield(struct{}{}) {
				return
			}
		}
	})
	return t
}

// Loop returns the task's loop, nil for a nil Task.
func (t *Task) Loop() *Loop {
	if t == nil {
		return nil
	}
	return t.loop
}

// Now returns the time: on a loop that of its last look at its connections, which
// costs nothing.
func (t *Task) Now() time.Time {
	if t.Attached() {
		return t.loop.clock
	}
	return time.Now()
}

// Attached reports whether the task runs on its loop: then it must not wait but by
// its connections, or Park. A nil Task is not attached.
func (t *Task) Attached() bool { return t != nil && t.attached }

// Park lets the loop go on until Wake, which may have been called before. Each Park
// is for one Wake, and each Wake for one Park. The task is attached.
func (t *Task) Park() {
	t.steps = 0
	t.said = saidParked
	t.yield(struct{}{})
}

// Wake ends a Park, from any goroutine.
func (t *Task) Wake() { t.loop.post(job{task: t}) }

// step counts a read or a write. A task that has had its share lets others go first.
func (t *Task) step() {
	if t.steps++; t.steps >= fairShare {
		t.Wake()
		t.Park()
	}
}

// Detach takes the task off its loop, to a goroutine of its own: from now on it may
// wait for anything. It does nothing if it was called before, or t is nil.
func (t *Task) Detach() {
	if !t.Attached() {
		return
	}
	t.attached = false
	t.said = saidLeft
	t.yield(struct{}{})
}

// Attach takes Detach back.
func (t *Task) Attach() {
	if t == nil || t.attached {
		return
	}
	t.attached = true
	t.said = saidBack
	t.yield(struct{}{})
}

// Block calls f, which may wait for anything, off the loop.
func (t *Task) Block(f func()) {
	if !t.Attached() {
		f()
		return
	}
	t.Detach()
	defer t.Attach()
	f()
}

// drive runs a task that has left its loop, until it has done its work or wants to
// come back.
func (t *Task) drive() {
	t.next()
	if t.said == saidBack {
		t.Wake()
	}
}
