// Counter-go counts visits. All of its instances add to one file in the app's
// data folder, which tako keeps over releases.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	// Kept outside the release: a new release finds the old count.
	file := filepath.Join(cmp.Or(os.Getenv("TAKO_DATA_DIR"), os.Getenv("HOME"), "."), "visits")
	var mine atomic.Int64

	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		all, err := count(file)
		if err != nil {
			log.Printf("count a visit: %v", err)
			http.Error(w, "the visit could not be counted", http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, "visit %d; %d of them answered by instance %s (release %s, process %d)\n", all, mine.Add(1),
			cmp.Or(os.Getenv("TAKO_INSTANCE"), "none"), cmp.Or(os.Getenv("TAKO_VERSION"), "none"), os.Getpid())
	})

	l, err := listen()
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go func() {
		<-ctx.Done()
		late, cancel := context.WithTimeout(context.Background(), 8*time.Second)
		defer cancel()
		server.Shutdown(late)
	}()
	log.Printf("listening on %s, counting in %s", l.Addr(), file)
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
}

// listen opens the Unix socket that tako names, or else the port.
func listen() (net.Listener, error) {
	if path := os.Getenv("TAKO_APP_SOCKET"); path != "" {
		return net.Listen("unix", path)
	}
	return net.Listen("tcp", net.JoinHostPort(cmp.Or(os.Getenv("HOST"), "127.0.0.1"), cmp.Or(os.Getenv("PORT"), "3000")))
}

// count adds one to the number in the file and returns it. The lock keeps the
// other instances out meanwhile; it goes with the descriptor.
func count(name string) (int, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return 0, fmt.Errorf("lock %s: %w", name, err)
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return 0, err
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(text))) // a new file is 0
	n++
	_, err = f.WriteAt([]byte(strconv.Itoa(n)+"\n"), 0)
	return n, err
}
