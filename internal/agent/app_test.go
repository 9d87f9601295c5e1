package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"tako/internal/ipc"
	"tako/internal/wire"
)

// TestMain is also the agent's second stage, and the apps that the tests run:
// this very program with the argument test-app.
func TestMain(m *testing.M) {
	Stage()
	if len(os.Args) > 2 && os.Args[1] == "test-app" {
		testApp(os.Args[2])
		os.Exit(0)
	}
	if len(os.Args) > 1 && os.Args[1] == "test-agent" {
		ch, err := ipc.Open(wire.ChannelFD)
		if err == nil {
			err = Run(context.Background(), Config{Channel: ch}, hclog.New(&hclog.LoggerOptions{Output: os.Stderr}))
		}
		if !errors.Is(err, io.EOF) {
			fmt.Fprintln(os.Stderr, "test-agent:", err)
		}
		os.Exit(wire.ExitPeer)
	}
	goleak.VerifyTestMain(m)
}

func testApp(kind string) {
	tcp := net.JoinHostPort(os.Getenv("HOST"), os.Getenv("PORT"))
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	switch kind {
	case "tcp":
		go serve("tcp", tcp, 200)
	case "unix":
		go serve("unix", os.Getenv("TAKO_APP_SOCKET"), 200)
	case "404":
		go serve("tcp", tcp, 404)
	case "elsewhere":
		go serve("tcp", "127.0.0.1:0", 200)
	case "silent":
	case "hang":
		l, _ := net.Listen("tcp", tcp)
		defer l.Close()
	case "crash":
		fmt.Println("about to fail")
		fmt.Fprintln(os.Stderr, "no such table: users")
		os.Exit(3)
	case "flood":
		line := strings.Repeat("x", 1023) + "\n"
		for range 10 << 10 {
			io.WriteString(os.Stdout, line)
		}
		go serve("tcp", tcp, 200)
	case "endless":
		line := []byte(strings.Repeat("x", 1023) + "\n")
		for {
			os.Stdout.Write(line)
		}
	case "stubborn", "leave-behind":
		signal.Ignore(syscall.SIGTERM)
		self, _ := os.Executable()
		p, err := os.StartProcess(self, []string{self, "test-app", "deaf"}, &os.ProcAttr{Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
		if err != nil {
			panic(err)
		}
		fmt.Println("grandchild", p.Pid)
		if kind == "leave-behind" {
			return
		}
		go serve("tcp", tcp, 200)
		select {}
	case "daemon", "daemon-clean": // a grandchild out of sight: another session, no parent, no files
		self, _ := os.Executable()
		p, err := os.StartProcess(self, []string{self, "test-app", kind + "-parent"}, &os.ProcAttr{Env: os.Environ(), Files: []*os.File{nil, os.Stdout, os.Stderr}, Sys: &syscall.SysProcAttr{Setsid: true}})
		if err != nil {
			panic(err)
		}
		_, _ = p.Wait()
		go serve("tcp", tcp, 200)
	case "daemon-parent", "daemon-clean-parent":
		env := os.Environ()
		if kind == "daemon-clean-parent" {
			env = []string{}
		}
		self, _ := os.Executable()
		p, err := os.StartProcess(self, []string{self, "test-app", "deaf"}, &os.ProcAttr{Env: env, Files: []*os.File{nil, nil, nil}, Sys: &syscall.SysProcAttr{Setsid: true}})
		if err != nil {
			panic(err)
		}
		fmt.Println("grandchild", p.Pid)
		return
	case "eat":
		var all [][]byte
		for range 64 {
			b := make([]byte, 8<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			all = append(all, b)
		}
		fmt.Println("ate", len(all))
		return
	case "chatter":
		for i := range 3000 {
			fmt.Printf("line %d\n", i)
		}
		fmt.Println("the reason is on this line")
		os.Exit(1)
	case "deaf":
		signal.Ignore(syscall.SIGTERM)
		select {}
	case "orphans": // leaves an ended child without a parent
		self, _ := os.Executable()
		os.StartProcess(self, []string{self, "test-app", "orphans-parent"}, &os.ProcAttr{Env: os.Environ(), Files: []*os.File{nil, os.Stdout, os.Stderr}})
		return
	case "orphans-parent":
		return
	case "env":
		wd, _ := os.Getwd()
		old := syscall.Umask(0)
		groups, _ := os.Getgroups()
		fmt.Printf("cwd %s\numask %o\nids %d %d %v\nleader %v\n", wd, old, os.Getuid(), os.Getgid(), groups, getsid() == os.Getpid())
		for _, v := range os.Environ() {
			fmt.Println("env", v)
		}
		fds, _ := os.ReadDir("/proc/self/fd")
		for _, f := range fds {
			if link, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && f.Name() > "2" && !strings.HasPrefix(link, "/sys/fs/cgroup") && !strings.HasPrefix(link, "anon_inode:[") {
				fmt.Println("fd", f.Name(), link)
			}
		}
		stdin, _ := os.Readlink("/proc/self/fd/0")
		fmt.Println("stdin", stdin)
		return
	case "long":
		fmt.Println(strings.Repeat("é", 12<<10))
		return
	case "write":
		for _, path := range os.Args[3:] {
			err := os.WriteFile(path, []byte("x"), 0o666)
			fmt.Println("write", path, err)
		}
		return
	}
	<-term
	fmt.Println("asked to stop")
	os.Exit(0)
}

func getsid() int {
	n, _, _ := syscall.RawSyscall(syscall.SYS_GETSID, 0, 0, 0)
	return int(n)
}

func serve(network, addr string, status int) {
	l, err := net.Listen(network, addr)
	if err != nil {
		panic(err)
	}
	_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) }))
}
