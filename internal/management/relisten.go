package management

import (
	"fmt"
	"io/fs"
	"os"
)

// Relisten gives the socket old, whose listener has come to another process, the
// name path, and has the link follow it. Who waits to be accepted waits on. Any
// error leaves a socket that still answers under old.
func Relisten(old, path, link string) error {
	old, link, err := absolute(old, link)
	if err != nil {
		return err
	}
	if path, _, err = absolute(path, link); err != nil {
		return err
	}
	if st, err := os.Lstat(old); err != nil {
		return fmt.Errorf("management socket: %w", err)
	} else if st.Mode()&fs.ModeSocket == 0 {
		return inTheWay(old)
	}
	to, linked := target(link)
	if err := os.Link(old, path); err != nil { // a second name first, so that the link is never without
		return fmt.Errorf("management socket: %w", err)
	}
	if linked && to == old {
		if err := Link(path, link); err != nil {
			_ = os.Remove(path)
			return err
		}
	}
	return remove(old)
}
