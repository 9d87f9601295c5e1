// Package cert keeps the certificates of a server: loads them from
// certs/<name>/fullchain.pem and privkey.pem, makes self-signed ones for names
// that no public authority signs, and signs with their keys for whoever may not
// have them. A private key never leaves this package.
//
// One bad certificate is its own trouble: it is logged and left out. What is
// made here is written whole or not at all, the key 0600.
package cert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/atomicfile"
	"tako/internal/tako"
)

// The files of a certificate's folder.
const (
	ChainFile = "fullchain.pem"
	KeyFile   = "privkey.pem"
)

// FallbackID is the folder of the certificate for names that no other has. It is
// no valid host, so that no app can hold it.
const FallbackID = "_fallback"

// Lifetimes of what is made here.
const (
	SelfSignedFor = 397 * 24 * time.Hour
	RenewBefore   = 30 * 24 * time.Hour
)

// MaxFile bounds each file of a certificate.
const MaxFile = 1 << 20

// A Certificate is the public part of one.
type Certificate struct {
	ID         string   // its folder
	Names      []string // exact names and one-level wildcards, A-labels in lower case
	Chain      [][]byte // DER, leaf first
	Fallback   bool
	SelfSigned bool // issuer and subject are one
	NotAfter   time.Time
	Key        [32]byte // SHA-256 of the public key's SubjectPublicKeyInfo
}

type entry struct {
	Certificate
	signer  crypto.Signer
	written time.Time // the chain's file, as Reread found it
}

// Keeper holds the certificates of one folder. It is safe for concurrent use.
type Keeper struct {
	dir string
	log hclog.Logger
	now func() time.Time

	beside atomic.Bool // another process keeps the folder

	mu   sync.Mutex
	byID map[string]*entry
	keys map[[32]byte]crypto.Signer // every key that may sign
}

// Open loads what is in dir, which exists, and makes sure that there is a
// fallback certificate.
func Open(dir string, now func() time.Time, log hclog.Logger) (*Keeper, error) {
	k := &Keeper{dir: dir, log: log, now: now, byID: make(map[string]*entry), keys: make(map[[32]byte]crypto.Signer)}
	folders, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	for _, f := range folders {
		if !f.IsDir() {
			continue
		}
		e, err := k.load(f.Name())
		if err != nil {
			log.Error("certificate left out", "certificate", f.Name(), "error", err)
			continue
		}
		k.put(e)
	}
	if _, err := k.ensure(FallbackID, []string{"tako.invalid"}); err != nil {
		return nil, fmt.Errorf("fallback certificate: %w", err)
	}
	return k, nil
}

func (k *Keeper) put(e *entry) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.byID[e.ID] = e
	k.keys[e.Key] = e.signer
}

// All returns every certificate, ordered by id.
func (k *Keeper) All() []Certificate {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := make([]Certificate, 0, len(k.byID))
	for _, id := range slices.Sorted(maps.Keys(k.byID)) {
		all = append(all, k.byID[id].Certificate)
	}
	return all
}

// Ensure makes sure that each of the hosts of an app's routes that only
// we can vouch for has a certificate, and returns those that were made. A host
// is a name or "*.suffix". For a public name without a certificate nothing is
// made: the fallback answers for it.
func (k *Keeper) Ensure(hosts []string) ([]Certificate, error) {
	if k.beside.Load() {
		return nil, nil
	}
	var made []Certificate
	for _, host := range hosts {
		if !Private(host) {
			continue
		}
		names := []string{host}
		if host == "localhost" {
			names = append(names, "*.localhost", "127.0.0.1", "::1")
		}
		e, err := k.ensure(host, names)
		if err != nil {
			return made, fmt.Errorf("certificate for %s: %w", host, err)
		}
		if e != nil {
			made = append(made, e.Certificate)
		}
	}
	return made, nil
}

// Renew makes anew the self-signed certificates that are about to end, and
// returns them.
func (k *Keeper) Renew() []Certificate {
	if k.beside.Load() {
		return nil
	}
	var made []Certificate
	for _, c := range k.All() {
		if !c.SelfSigned || k.now().Before(c.NotAfter.Add(-RenewBefore)) {
			continue
		}
		e, err := k.selfSign(c.ID, c.Names)
		if err != nil {
			k.log.Error("certificate not renewed", "certificate", c.ID, "error", err)
			continue
		}
		made = append(made, e.Certificate)
	}
	return made
}

// ensure makes the certificate id unless one that is still good for a while
// covers its first name. It returns nil if nothing had to be made.
func (k *Keeper) ensure(id string, names []string) (*entry, error) {
	k.mu.Lock()
	var have *entry
	for _, e := range k.byID {
		if e.ID == id || covers(e.Names, names[0]) {
			if have == nil || e.NotAfter.After(have.NotAfter) {
				have = e
			}
		}
	}
	k.mu.Unlock()
	if have != nil && (!have.SelfSigned || k.now().Before(have.NotAfter.Add(-RenewBefore))) {
		return nil, nil
	}
	return k.selfSign(id, names)
}

// covers reports whether one of names is host, or its one-level wildcard.
func covers(names []string, host string) bool {
	if slices.Contains(names, host) {
		return true
	}
	_, parent, ok := strings.Cut(host, ".")
	return ok && !strings.HasPrefix(host, "*") && slices.Contains(names, "*."+parent)
}

// selfSign makes, writes and holds a self-signed certificate.
func (k *Keeper) selfSign(id string, names []string) (*entry, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := k.now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Tako"}},
		NotBefore:             now.Add(-time.Hour), // clocks differ
		NotAfter:              now.Add(SelfSignedFor),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if len(names[0]) <= 64 { // the bound of a common name, X.520
		template.Subject.CommonName = names[0]
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(k.dir, id)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	// The key first: a chain without its key is left out at the next start, and
	// made again.
	if err := atomicfile.WriteFile(filepath.Join(dir, KeyFile), pemBytes("PRIVATE KEY", keyDER), 0o600); err != nil {
		return nil, err
	}
	if err := atomicfile.WriteFile(filepath.Join(dir, ChainFile), pemBytes("CERTIFICATE", der), 0o644); err != nil {
		return nil, err
	}
	e, err := newEntry(id, [][]byte{der}, key)
	if err != nil {
		return nil, err
	}
	k.put(e)
	return e, nil
}

func pemBytes(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// load reads one certificate's folder.
func (k *Keeper) load(id string) (*entry, error) {
	dir := filepath.Join(k.dir, id)
	keyPath := filepath.Join(dir, KeyFile)
	if fi, err := os.Lstat(keyPath); err != nil {
		return nil, err
	} else if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("others can read %s: run chmod 600 %s", keyPath, keyPath)
	}
	chain, err := readBounded(filepath.Join(dir, ChainFile))
	if err != nil {
		return nil, err
	}
	key, err := readBounded(keyPath)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, err
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", pair.PrivateKey)
	}
	switch signer.Public().(type) {
	case *ecdsa.PublicKey, *rsa.PublicKey:
	default:
		return nil, fmt.Errorf("a key of type %T: only ECDSA and RSA are served", pair.PrivateKey)
	}
	return newEntry(id, pair.Certificate, signer)
}

func readBounded(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > MaxFile || !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file of at most %d bytes", path, MaxFile)
	}
	return os.ReadFile(path)
}

func newEntry(id string, chain [][]byte, signer crypto.Signer) (*entry, error) {
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(leaf.DNSNames)+len(leaf.IPAddresses))
	for _, n := range leaf.DNSNames {
		names = append(names, strings.ToLower(n))
	}
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	spki, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, err
	}
	return &entry{
		Certificate: Certificate{
			ID: id, Names: names, Chain: chain, Fallback: id == FallbackID,
			SelfSigned: slices.Equal(leaf.RawIssuer, leaf.RawSubject),
			NotAfter:   leaf.NotAfter,
			Key:        sha256.Sum256(spki),
		},
		signer: signer,
	}, nil
}

// Algorithms of Sign.
const (
	ECDSA    = "ecdsa"
	RSAPSS   = "rsa-pss"
	RSAPKCS1 = "rsa-pkcs1"
)

// Sign signs a digest of SHA-256, SHA-384 or SHA-512 with the key that has this
// hash. It refuses unknown keys, other lengths and other algorithms, with a
// *tako.Error.
func (k *Keeper) Sign(key []byte, algorithm string, digest []byte) ([]byte, error) {
	if len(key) != sha256.Size {
		return nil, tako.Errorf(tako.CodeInvalid, "a key is named by 32 bytes, not %d", len(key))
	}
	k.mu.Lock()
	signer := k.keys[[32]byte(key)]
	k.mu.Unlock()
	if signer == nil {
		return nil, tako.Errorf(tako.CodeNotFound, "no such key")
	}
	var hash crypto.Hash
	switch len(digest) {
	case crypto.SHA256.Size():
		hash = crypto.SHA256
	case crypto.SHA384.Size():
		hash = crypto.SHA384
	case crypto.SHA512.Size():
		hash = crypto.SHA512
	default:
		return nil, tako.Errorf(tako.CodeInvalid, "a digest of %d bytes is none of SHA-256, SHA-384, SHA-512", len(digest))
	}
	var opts crypto.SignerOpts = hash
	_, isRSA := signer.Public().(*rsa.PublicKey)
	switch {
	case algorithm == ECDSA && !isRSA, algorithm == RSAPKCS1 && isRSA:
	case algorithm == RSAPSS && isRSA:
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
	default:
		return nil, tako.Errorf(tako.CodeInvalid, "algorithm %q does not go with this key", algorithm)
	}
	return signer.Sign(rand.Reader, digest, opts)
}

// Private reports whether host is a name that no public authority signs for:
// localhost, single labels, and the suffixes kept for private use (RFC 2606,
// 6761, 6762, 8375).
func Private(host string) bool {
	host = strings.ToLower(strings.TrimRight(strings.TrimPrefix(host, "*."), "."))
	if net.ParseIP(host) != nil {
		return true
	}
	if !strings.Contains(host, ".") {
		return true
	}
	for _, suffix := range []string{".localhost", ".local", ".test", ".invalid", ".example", ".home.arpa"} {
		if strings.HasSuffix(host, suffix) {
			return true
		}
	}
	return host == "home.arpa"
}
