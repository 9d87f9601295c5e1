package cert

import (
	"crypto"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
)

// OpenBeside loads what is in a folder that another process keeps: until Own
// nothing is made there, neither by Ensure nor by Renew. Reread finds what that
// process has made since.
func OpenBeside(dir string, now func() time.Time, log hclog.Logger) (*Keeper, error) {
	k := &Keeper{dir: dir, log: log, now: now, byID: make(map[string]*entry), keys: make(map[[32]byte]crypto.Signer)}
	k.beside.Store(true)
	if _, err := os.ReadDir(dir); err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	k.Reread()
	return k, nil
}

// Own makes the folder ours to keep, as Open does.
func (k *Keeper) Own() error {
	k.beside.Store(false)
	if _, err := k.ensure(FallbackID, []string{"tako.invalid"}); err != nil {
		return fmt.Errorf("fallback certificate: %w", err)
	}
	return nil
}

// Reread loads the certificates of the folder that we do not hold as they are
// there, and returns them, ordered by id. One that is just being written, or bad,
// is left for the next time.
func (k *Keeper) Reread() []Certificate {
	folders, err := os.ReadDir(k.dir)
	if err != nil {
		k.log.Warn("certificates not looked at", "error", err)
		return nil
	}
	var found []Certificate
	for _, f := range folders {
		fi, err := os.Stat(filepath.Join(k.dir, f.Name(), ChainFile))
		if !f.IsDir() || err != nil {
			continue // without a chain it is none yet
		}
		k.mu.Lock()
		have := k.byID[f.Name()]
		k.mu.Unlock()
		if have != nil && have.written.Equal(fi.ModTime()) {
			continue
		}
		e, err := k.load(f.Name())
		if err != nil {
			k.log.Debug("certificate left out", "certificate", f.Name(), "error", err)
			continue
		}
		e.written = fi.ModTime()
		same := have != nil && e.Key == have.Key && slices.EqualFunc(e.Chain, have.Chain, slices.Equal)
		k.put(e)
		if !same {
			found = append(found, e.Certificate)
		}
	}
	return found
}
