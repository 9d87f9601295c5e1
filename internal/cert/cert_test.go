package cert_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/cert"
	"tako/internal/tako"
)

func open(t *testing.T, dir string, now func() time.Time) *cert.Keeper {
	t.Helper()
	k, err := cert.Open(dir, now, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func byID(t *testing.T, k *cert.Keeper, id string) cert.Certificate {
	t.Helper()
	for _, c := range k.All() {
		if c.ID == id {
			return c
		}
	}
	t.Fatalf("no certificate %q", id)
	return cert.Certificate{}
}

func TestFallbackIsMadeOnceAndKept(t *testing.T) {
	dir := t.TempDir()
	first := byID(t, open(t, dir, time.Now), cert.FallbackID)
	if !first.Fallback || !first.SelfSigned {
		t.Errorf("fallback is %+v, want Fallback and SelfSigned", first)
	}
	again := byID(t, open(t, dir, time.Now), cert.FallbackID)
	if first.Key != again.Key {
		t.Error("the fallback has another key after a restart")
	}
	fi, err := os.Stat(filepath.Join(dir, cert.FallbackID, cert.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode is %o, want 600", fi.Mode().Perm())
	}
}

func TestOnlyPrivateNamesAreSelfSigned(t *testing.T) {
	k := open(t, t.TempDir(), time.Now)
	made, err := k.Ensure([]string{"app.localhost", "*.app.test", "shop.example.com", "intranet"})
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, c := range made {
		ids = append(ids, c.ID)
		leaf, err := x509.ParseCertificate(c.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(leaf.DNSNames, c.Names) {
			t.Errorf("%s: names %v in the certificate, %v said", c.ID, leaf.DNSNames, c.Names)
		}
		if err := leaf.CheckSignatureFrom(leaf); err == nil {
			t.Errorf("%s may sign others", c.ID)
		}
	}
	if want := []string{"app.localhost", "*.app.test", "intranet"}; !slices.Equal(ids, want) {
		t.Errorf("made %v, want %v", ids, want)
	}
	if again, err := k.Ensure([]string{"app.localhost", "x.app.test"}); err != nil || len(again) != 0 {
		t.Errorf("made %v again (%v), want none: both are covered", again, err)
	}
}

func TestSelfSignedIsRenewedBeforeItEnds(t *testing.T) {
	now := time.Now()
	k := open(t, t.TempDir(), func() time.Time { return now })
	if _, err := k.Ensure([]string{"app.localhost"}); err != nil {
		t.Fatal(err)
	}
	old := byID(t, k, "app.localhost")
	now = now.Add(cert.SelfSignedFor - cert.RenewBefore - 2*time.Hour)
	if made := k.Renew(); len(made) != 0 {
		t.Errorf("renewed %d too early", len(made))
	}
	now = now.Add(3 * time.Hour)
	if made := k.Renew(); len(made) != 2 {
		t.Errorf("renewed %d, want the fallback and app.localhost", len(made))
	}
	if fresh := byID(t, k, "app.localhost"); fresh.Key == old.Key || !fresh.NotAfter.After(old.NotAfter) {
		t.Errorf("the renewed certificate ends %v, the old one %v", fresh.NotAfter, old.NotAfter)
	}
	// Handshakes under way with the old one are still signed.
	digest := sha256.Sum256([]byte("hello"))
	if _, err := k.Sign(old.Key[:], cert.ECDSA, digest[:]); err != nil {
		t.Errorf("the old key does not sign any more: %v", err)
	}
}

func TestOneBadCertificateIsItsOwnTrouble(t *testing.T) {
	dir := t.TempDir()
	open(t, dir, time.Now)
	write := func(id, file, text string, mode os.FileMode) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, id), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, id, file), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("torn.example.com", cert.ChainFile, "-----BEGIN CERTIFICATE-----\nMIIB", 0o644)
	write("torn.example.com", cert.KeyFile, "", 0o600)
	chain, key := issue(t, mustRSA(t), "open.example.com")
	write("open.example.com", cert.ChainFile, chain, 0o644)
	write("open.example.com", cert.KeyFile, key, 0o644) // others can read it
	chain, key = issue(t, mustRSA(t), "good.example.com")
	write("good.example.com", cert.ChainFile, chain, 0o644)
	write("good.example.com", cert.KeyFile, key, 0o600)
	var ids []string
	for _, c := range open(t, dir, time.Now).All() {
		ids = append(ids, c.ID)
	}
	if want := []string{cert.FallbackID, "good.example.com"}; !slices.Equal(ids, want) {
		t.Errorf("loaded %v, want %v", ids, want)
	}
}

func TestSignRefusesWhatIsNotATLSSignature(t *testing.T) {
	dir := t.TempDir()
	k := open(t, dir, time.Now)
	ec := byID(t, k, cert.FallbackID)
	digest := sha256.Sum256([]byte("hello"))
	sig, err := k.Sign(ec.Key[:], cert.ECDSA, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(ec.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.VerifyASN1(leaf.PublicKey.(*ecdsa.PublicKey), digest[:], sig) {
		t.Error("the signature is not good")
	}
	for name, tc := range map[string]struct {
		key       []byte
		algorithm string
		digest    []byte
		code      tako.Code
	}{
		"unknown key":     {make([]byte, 32), cert.ECDSA, digest[:], tako.CodeNotFound},
		"short key":       {ec.Key[:31], cert.ECDSA, digest[:], tako.CodeInvalid},
		"short digest":    {ec.Key[:], cert.ECDSA, digest[:31], tako.CodeInvalid},
		"no digest":       {ec.Key[:], cert.ECDSA, nil, tako.CodeInvalid},
		"other algorithm": {ec.Key[:], "ed25519", digest[:], tako.CodeInvalid},
		"RSA of an EC":    {ec.Key[:], cert.RSAPSS, digest[:], tako.CodeInvalid},
	} {
		if _, err := k.Sign(tc.key, tc.algorithm, tc.digest); tako.AsError(err) == nil || tako.AsError(err).Code != tc.code {
			t.Errorf("%s: error %v, want code %s", name, err, tc.code)
		}
	}
}

func TestRSASignatures(t *testing.T) {
	dir := t.TempDir()
	priv := mustRSA(t)
	chain, key := issue(t, priv, "rsa.example.com")
	if err := os.MkdirAll(filepath.Join(dir, "rsa.example.com"), 0o700); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{cert.ChainFile: chain, cert.KeyFile: key} {
		if err := os.WriteFile(filepath.Join(dir, "rsa.example.com", file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k := open(t, dir, time.Now)
	c := byID(t, k, "rsa.example.com")
	digest := sha256.Sum256([]byte("hello"))
	pss, err := k.Sign(c.Key[:], cert.RSAPSS, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	if err := rsa.VerifyPSS(&priv.PublicKey, crypto.SHA256, digest[:], pss, nil); err != nil {
		t.Error(err)
	}
	p1, err := k.Sign(c.Key[:], cert.RSAPKCS1, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	if err := rsa.VerifyPKCS1v15(&priv.PublicKey, crypto.SHA256, digest[:], p1); err != nil {
		t.Error(err)
	}
}

func TestPrivate(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "app.localhost": true, "intranet": true, "nas.local": true, "x.test": true, "x.invalid": true,
		"www.example": true, "box.home.arpa": true, "home.arpa": true, "127.0.0.1": true, "*.app.test": true, "App.Test.": true,
		"example.com": false, "shop.example.com": false, "*.example.com": false, "mytest": true, "mytest.org": false, "atest.net": false,
	} {
		if got := cert.Private(host); got != want {
			t.Errorf("Private(%q) = %t, want %t", host, got, want)
		}
	}
}

func mustRSA(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue makes a certificate that an authority of the test has signed.
func issue(t *testing.T, key crypto.Signer, name string) (chain, private string) {
	t.Helper()
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour),
	}
	parent := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "test authority"}}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), ca)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
}
