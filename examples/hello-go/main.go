// Hello-go is a small web app to deploy with tako. It listens where tako tells
// it to, answers the health probe on /status, and on SIGTERM finishes what it
// has begun.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"html/template"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// greeting is here to be edited: change it, deploy again, and reload the page.
const greeting = "Hello from tako"

var page = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{.Greeting}}</title>
<style>
  body { font: 16px/1.6 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto; padding: 0 1rem; color: #222 }
  h1 { font-weight: 600 } dt { color: #777; float: left; width: 6rem } dd { margin: 0; font-family: monospace }
</style>
<h1>{{.Greeting}}</h1>
<dl>
  <dt>release<dd>{{.Release}}
  <dt>instance<dd>{{.Instance}}
  <dt>process<dd>{{.PID}}
  <dt>host<dd>{{.Host}}
  <dt>scheme<dd>{{.Scheme}}
  <dt>protocol<dd>{{.Protocol}}
</dl>
<p><a href="/slow">/slow</a> takes three seconds, <a href="/stream">/stream</a> never ends.</p>
`))

func main() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /{$}", index)
	mux.HandleFunc("GET /slow", slow)

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) { stream(ctx, w, r) })

	l, err := listen()
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		<-ctx.Done()
		log.Print("asked to stop: finishing what has begun")
		late, cancel := context.WithTimeout(context.Background(), 8*time.Second)
		defer cancel()
		server.Shutdown(late)
	}()
	log.Printf("listening on %s", l.Addr())
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

func index(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	err := page.Execute(w, map[string]any{
		"Greeting": greeting,
		"Release":  cmp.Or(os.Getenv("TAKO_VERSION"), "none"),
		"Instance": cmp.Or(os.Getenv("TAKO_INSTANCE"), "none"),
		"PID":      os.Getpid(),
		"Host":     r.Host,
		"Scheme":   cmp.Or(r.Header.Get("X-Forwarded-Proto"), "http"),
		"Protocol": r.Proto,
	})
	if err != nil {
		log.Print(err)
	}
}

// slow answers after three seconds: a request that is in flight while something
// else happens to the app.
func slow(w http.ResponseWriter, r *http.Request) {
	select {
	case <-time.After(3 * time.Second):
		fmt.Fprintln(w, "done")
	case <-r.Context().Done():
	}
}

// stream sends the time as server-sent events, one a second, until the client
// leaves or the app is asked to stop.
func stream(stopping context.Context, w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for flush := http.NewResponseController(w); ; {
		fmt.Fprintf(w, "data: %s\n\n", time.Now().UTC().Format(time.RFC3339))
		if err := flush.Flush(); err != nil {
			return
		}
		select {
		case <-tick.C:
		case <-stopping.Done():
			return
		case <-r.Context().Done():
			return
		}
	}
}
