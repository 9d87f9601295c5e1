package h2

import (
	"sync"
	"time"
)

// The limits of idle workers.
const (
	// workerIdle is how long a worker waits for work, at least; at most twice that.
	workerIdle = 5 * time.Second
	// maxWorkersIdle bounds the workers that wait.
	maxWorkersIdle = 4096
)

// A task is for a worker: to answer a stream, or to write what a connection has
// to send.
type task struct {
	s *stream
	c *conn
}

func (t task) do() {
	if t.s != nil {
		t.s.answer()
	} else {
		t.c.flush()
	}
}

// workers are goroutines that are kept for the next task for a while, the last
// one to finish being the first to be used again.
type workers struct {
	mu     sync.Mutex
	idle   []*worker // the last is the next to be used
	fewest int       // the least that idle had since the last sweep
	timer  *time.Timer
	armed  bool
	closed bool
}

type worker struct{ tasks chan task } // with room for one; closed when it is to end

// run has t done by another goroutine.
func (p *workers) run(t task) {
	p.mu.Lock()
	n := len(p.idle) - 1
	if n < 0 {
		p.mu.Unlock()
		go p.work(t)
		return
	}
	w := p.idle[n]
	p.idle[n] = nil
	p.idle = p.idle[:n]
	p.fewest = min(p.fewest, n)
	p.mu.Unlock()
	w.tasks <- t
}

func (p *workers) work(t task) {
	w := &worker{tasks: make(chan task, 1)}
	for {
		t.do()
		p.mu.Lock()
		if p.closed || len(p.idle) >= maxWorkersIdle {
			p.mu.Unlock()
			return
		}
		p.idle = append(p.idle, w)
		if !p.armed {
			p.armed, p.fewest = true, 0
			if p.timer == nil {
				p.timer = time.AfterFunc(workerIdle, p.sweep)
			} else {
				p.timer.Reset(workerIdle)
			}
		}
		p.mu.Unlock()
		var more bool
		if t, more = <-w.tasks; !more {
			return
		}
	}
}

// sweep ends the workers that nobody needed since the last sweep.
func (p *workers) sweep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.end(min(p.fewest, len(p.idle)))
	p.fewest = len(p.idle)
	if p.armed = len(p.idle) > 0; p.armed {
		p.timer.Reset(workerIdle)
	}
}

// end ends the first n that wait. The caller holds mu.
func (p *workers) end(n int) {
	for _, w := range p.idle[:n] {
		close(w.tasks)
	}
	k := copy(p.idle, p.idle[n:])
	clear(p.idle[k:])
	p.idle = p.idle[:k]
}

// close ends all that wait, and the others when they have done their task.
func (p *workers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.end(len(p.idle))
	if p.timer != nil {
		p.timer.Stop()
	}
}
