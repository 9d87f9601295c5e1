package proxy

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"tako/internal/proxy/eventloop"
	"tako/internal/wire"
)

// SignTime bounds one signature by the master, and SignTries how often it is
// asked for.
const (
	SignTime  = 5 * time.Second
	SignTries = 2
)

// certs are the certificates that may be presented. Set and remove are for one
// goroutine, the rest for any.
type certs struct {
	signer signer

	byID  map[string]*certEntry
	order uint64 // of the last entry
	index atomic.Pointer[certIndex]
}

// signer is who has the keys.
type signer interface {
	sign(context.Context, *wire.Sign) ([]byte, error)
	// signOn is sign from a task, or reports false.
	signOn(*eventloop.Task, *wire.Sign) (signature []byte, ok bool)
}

type certEntry struct {
	order    uint64
	names    []string
	fallback bool
	cert     *tls.Certificate
}

// certIndex never changes.
type certIndex struct {
	exact, wild map[string]*tls.Certificate // wild without the "*."
	fallback    *tls.Certificate
}

func newCerts(by signer) *certs {
	c := &certs{signer: by, byID: make(map[string]*certEntry)}
	c.index.Store(&certIndex{})
	return c
}

// set adds a certificate, or replaces the one with the same id.
func (c *certs) set(m *wire.Certificate) error {
	if m.ID == "" || len(m.Chain) == 0 {
		return fmt.Errorf("certificate %q has no id or no chain", m.ID)
	}
	leaf, err := x509.ParseCertificate(m.Chain[0])
	if err != nil {
		return fmt.Errorf("certificate %q: %w", m.ID, err)
	}
	switch leaf.PublicKey.(type) {
	case *ecdsa.PublicKey, *rsa.PublicKey:
	default:
		return fmt.Errorf("certificate %q has a key of type %T, which cannot be asked to sign", m.ID, leaf.PublicKey)
	}
	spki := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	c.order++
	e := &certEntry{order: c.order, fallback: m.Fallback, cert: &tls.Certificate{
		Certificate: m.Chain, Leaf: leaf,
		PrivateKey: &remoteKey{public: leaf.PublicKey, spki: spki[:], signer: c.signer},
	}}
	for _, name := range m.Names {
		e.names = append(e.names, strings.ToLower(strings.TrimSuffix(name, ".")))
	}
	c.byID[m.ID] = e
	c.rebuild()
	return nil
}

// remove forgets a certificate. An unknown id is no matter.
func (c *certs) remove(id string) {
	delete(c.byID, id)
	c.rebuild()
}

func (c *certs) rebuild() {
	all := make([]*certEntry, 0, len(c.byID))
	for _, e := range c.byID {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *certEntry) int { return int(a.order) - int(b.order) }) // the newest wins
	index := &certIndex{exact: make(map[string]*tls.Certificate), wild: make(map[string]*tls.Certificate)}
	for _, e := range all {
		for _, name := range e.names {
			if suffix, ok := strings.CutPrefix(name, "*."); ok {
				index.wild[suffix] = e.cert
			} else {
				index.exact[name] = e.cert
			}
		}
		if e.fallback {
			index.fallback = e.cert
		}
	}
	c.index.Store(index)
}

// get chooses for a handshake: the exact name, one level of wildcard, the
// fallback.
func (c *certs) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert := c.index.Load().find(hello.ServerName)
	if cert == nil {
		return nil, fmt.Errorf("no certificate for %q", hello.ServerName)
	}
	if s, ok := hello.Conn.(*tlsSocket); ok && s.task.Attached() {
		return s.certificate(cert), nil
	}
	return cert, nil
}

// find returns nil if there is none.
func (i *certIndex) find(name string) *tls.Certificate {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if cert := i.exact[name]; cert != nil && name != "" {
		return cert
	}
	if _, suffix, ok := strings.Cut(name, "."); ok {
		if cert := i.wild[suffix]; cert != nil {
			return cert
		}
	}
	return i.fallback
}

// remoteKey is a private key that stays in the master. It can sign and nothing
// else: there is no decryption, so no key exchange that could need it.
type remoteKey struct {
	public crypto.PublicKey
	spki   []byte
	signer signer
}

func (k *remoteKey) Public() crypto.PublicKey { return k.public }

func (k *remoteKey) request(digest []byte, opts crypto.SignerOpts) *wire.Sign {
	algorithm := wire.SignRSAPKCS1
	if _, ok := k.public.(*ecdsa.PublicKey); ok {
		algorithm = wire.SignECDSA
	} else if _, ok := opts.(*rsa.PSSOptions); ok {
		algorithm = wire.SignRSAPSS
	}
	return &wire.Sign{Key: k.spki, Algorithm: algorithm, Digest: digest}
}

// Sign asks the master.
func (k *remoteKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.try(SignTries, digest, opts)
}

// try asks that many times at most.
func (k *remoteKey) try(times int, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	var err error
	for range times {
		var signature []byte
		ctx, cancel := context.WithTimeout(context.Background(), SignTime)
		signature, err = k.signer.sign(ctx, k.request(digest, opts))
		cancel()
		if err == nil {
			return signature, nil
		}
	}
	return nil, fmt.Errorf("sign a handshake: %w", err)
}

// taskKey is a remoteKey for the handshake of one task, which parks meanwhile.
type taskKey struct {
	*remoteKey
	task *eventloop.Task
}

// Sign asks the master.
func (k *taskKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	signature, ok := k.signer.signOn(k.task, k.request(digest, opts))
	if !ok {
		k.task.Block(func() { signature, err = k.try(SignTries-1, digest, opts) })
	}
	return signature, err
}

// cipherSuites are those of TLS 1.2 that are offered: forward secret and AEAD.
// Those of TLS 1.3 all are.
var cipherSuites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// tlsConfig is for all HTTPS listeners; ticket keys are set on it later.
func (c *certs) tlsConfig() *tls.Config {
	conf := &tls.Config{
		MinVersion: tls.VersionTLS12, CipherSuites: cipherSuites,
		NextProtos: []string{"h2", "http/1.1"}, GetCertificate: c.get,
		// Small first records would be a write each; heads go out with bodies here.
		DynamicRecordSizingDisabled: true,
	}
	conf.UnwrapSession = func(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
		s, err := conf.DecryptTicket(ticket, cs)
		if err != nil || s == nil || !fresh(s, time.Now()) {
			return nil, err // without a session the handshake is a full one
		}
		return s, nil
	}
	return conf
}

// TicketLife is how long a TLS session can be resumed, counted from its full
// handshake in TLS 1.2, and from the ticket's issue in TLS 1.3, where each
// resumption agrees on new keys. Package crypto/tls itself allows a week.
const TicketLife = 24 * time.Hour

// fresh reports whether a session is not older than TicketLife. Its encoding
// begins with version, kind and cipher suite, 5 bytes, and then when it was made,
// in Unix seconds.
func fresh(s *tls.SessionState, now time.Time) bool {
	b, err := s.Bytes()
	if err != nil || len(b) < 13 {
		return false
	}
	made := binary.BigEndian.Uint64(b[5:])
	if made > math.MaxInt64 {
		return false
	}
	age := now.Sub(time.Unix(int64(made), 0))
	return age > -time.Minute && age <= TicketLife
}

// ticketKeys checks and converts the keys of session tickets.
func ticketKeys(m *wire.TicketKeys) ([][32]byte, error) {
	if len(m.Keys) == 0 || len(m.Keys) > wire.MaxTicketKeys {
		return nil, fmt.Errorf("%d ticket keys, want 1 to %d", len(m.Keys), wire.MaxTicketKeys)
	}
	keys := make([][32]byte, len(m.Keys))
	for i, k := range m.Keys {
		if len(k) != len(keys[i]) {
			return nil, fmt.Errorf("a ticket key of %d bytes, want %d", len(k), len(keys[i]))
		}
		copy(keys[i][:], k)
	}
	return keys, nil
}
