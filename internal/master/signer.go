package master

import (
	"crypto/rand"
	"runtime"
	"sync"
	"time"

	"tako/internal/logging"
	"tako/internal/tako"
	"tako/internal/wire"
)

// MaxSigning bounds how many signatures of one proxy are in work or wait; more
// are refused, and those handshakes fail.
const MaxSigning = 512

// serveSigner answers a proxy's requests for signatures until its socket ends.
func (s *server) serveSigner(l *proxyLink) {
	conn := l.signer
	defer conn.Close()
	go func() {
		<-l.ended
		_ = conn.Close() // it has left: nothing more to sign
	}()
	cores := make(chan struct{}, runtime.GOMAXPROCS(0))
	room := make(chan struct{}, MaxSigning)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		m, err := conn.Receive()
		if err != nil {
			wg.Wait() // nothing is left unanswered in a pause
			if l.signing.held(err, l.ended) {
				continue
			}
			select {
			case <-l.ended:
			default:
				l.kill(err) // without signatures it is of no use
			}
			return
		}
		req, ok := m.Body.(*wire.Sign)
		if !ok {
			m.Discard()
			continue
		}
		select {
		case room <- struct{}{}:
		default:
			_ = conn.ReplyError(m.ID, tako.Errorf(tako.CodeBusy, "more than %d signatures at one time", MaxSigning))
			continue
		}
		sign := func() {
			defer func() { <-room }()
			sig, err := s.certs.Sign(req.Key, string(req.Algorithm), req.Digest)
			if err != nil {
				l.log.Warn("signature refused", logging.Err, err)
				_ = conn.ReplyError(m.ID, err)
				return
			}
			_ = conn.Reply(m.ID, &wire.Signed{Signature: sig})
		}
		// One that is quick and has nothing behind it costs no other goroutine.
		if req.Algorithm == wire.SignECDSA && (cap(cores) == 1 || !conn.Waiting()) {
			sign()
			continue
		}
		wg.Go(func() {
			cores <- struct{}{}
			defer func() { <-cores }()
			sign()
		})
	}
}

// TicketsRotate is how often a new session ticket key comes into use. Three old
// ones are still understood.
const TicketsRotate = 12 * time.Hour

// ticketKeys are the keys that every proxy seals TLS session tickets with. They
// live in memory only: after a restart of the master sessions begin anew.
type ticketKeys struct {
	mu   sync.Mutex
	keys [][]byte
}

func (t *ticketKeys) current() [][]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.keys) == 0 {
		t.keys = [][]byte{newTicketKey()}
	}
	return append([][]byte(nil), t.keys...)
}

func (t *ticketKeys) rotate() [][]byte {
	t.mu.Lock()
	t.keys = append([][]byte{newTicketKey()}, t.keys...)
	t.keys = t.keys[:min(len(t.keys), wire.MaxTicketKeys)]
	t.mu.Unlock()
	return t.current()
}

// set takes the keys of another server.
func (t *ticketKeys) set(keys [][]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys = keys[:min(len(keys), wire.MaxTicketKeys)]
}

func newTicketKey() []byte {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails: crypto/rand ends the program instead
	return key
}
