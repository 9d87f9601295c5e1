package cert_test

import (
	"os"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/cert"
)

func TestBesideTheKeeperOfAFolderNothingIsMade(t *testing.T) {
	dir := t.TempDir()
	k, err := cert.OpenBeside(dir, time.Now, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	late := func() time.Time { return time.Now().Add(cert.SelfSignedFor) }
	aged, err := cert.OpenBeside(dir, late, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if made, err := k.Ensure([]string{"a.localhost"}); err != nil || len(made) > 0 {
		t.Errorf("made %v, %v", made, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Fatalf("there is %v, %v, want nothing", left, err)
	}

	owner := open(t, dir, time.Now)
	if _, err := owner.Ensure([]string{"a.localhost"}); err != nil {
		t.Fatal(err)
	}
	if found := k.Reread(); len(found) != 2 || found[0].ID != cert.FallbackID || found[1].ID != "a.localhost" {
		t.Fatalf("found %v, want the fallback and a.localhost", found)
	}
	if found := k.Reread(); len(found) > 0 {
		t.Errorf("found %v again", found)
	}
	if a, b := byID(t, owner, "a.localhost"), byID(t, k, "a.localhost"); a.Key != b.Key {
		t.Error("the owner's certificate has another key")
	}
	// Renewed by the owner: the new one is found, and nothing is made beside it.
	aged.Reread()
	if made := aged.Renew(); len(made) > 0 {
		t.Errorf("made %v", made)
	}
	before := byID(t, k, "a.localhost")
	if made := open(t, dir, late).Renew(); len(made) == 0 {
		t.Fatal("the owner renewed nothing")
	}
	if found := k.Reread(); len(found) != 2 || found[1].Key == before.Key {
		t.Errorf("found %v, want both, with new keys", found)
	}
	// The owner goes.
	if err := k.Own(); err != nil {
		t.Fatal(err)
	}
	if made, err := k.Ensure([]string{"b.test"}); err != nil || len(made) != 1 {
		t.Errorf("made %v, %v, want one", made, err)
	}
}
