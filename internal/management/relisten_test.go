package management

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestSocketGoesOnUnderAnotherName(t *testing.T) {
	dir := t.TempDir()
	old, path, link := filepath.Join(dir, "tako-1.sock"), filepath.Join(dir, "tako-2.sock"), filepath.Join(dir, "tako.sock")
	l, err := Listen(old, link, 0o660, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	waits, err := net.Dial("unix", link)
	if err != nil {
		t.Fatal(err)
	}
	defer waits.Close()
	if err := Relisten(old, path, link); err != nil {
		t.Fatal(err)
	}
	later, err := net.Dial("unix", link)
	if err != nil {
		t.Fatal(err)
	}
	defer later.Close()
	for range 2 {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	if _, err := os.Lstat(old); !os.IsNotExist(err) {
		t.Errorf("the old name is there: %v", err)
	}
	if err := Unlisten(path, link); err != nil {
		t.Error(err)
	}
	if err := Relisten(old, path, link); err == nil {
		t.Error("a socket that is gone has another name")
	}
	if err := os.WriteFile(old, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Relisten(old, path, link); err == nil {
		t.Error("a file has become a socket")
	}
}
