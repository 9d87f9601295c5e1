// Package integration tests the real programs together: they are built, started
// on free ports with temporary folders, and asked as an operator and a visitor
// would. The stories are the scripts in testdata/script; what a script cannot
// say stands in Go files beside this one.
package integration

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"tako/internal/takotest"
)

func TestMain(m *testing.M) { os.Exit(takotest.Main(m)) }

// commands are what scripts may say beyond testscript's own words.
var commands = map[string]func(ts *testscript.TestScript, neg bool, args []string){
	"server":  cmdServer,
	"takoctl": cmdTakoctl,
	"app":     cmdApp,
	"example": cmdExample,
	"get":     cmdGet,
	"say":     cmdSay,
}

func TestScripts(t *testing.T) { run(t, "testdata/script") }

// TestScriptsOfFrameworks installs apps of real frameworks with npm, which takes
// minutes and the registry.
func TestScriptsOfFrameworks(t *testing.T) {
	if os.Getenv("TAKO_SLOW") == "" {
		t.Skip("slow: runs with make integration-slow")
	}
	run(t, "testdata/slow")
}

func run(t *testing.T, dir string) {
	if testing.Short() {
		t.Skip("-short: it builds and runs the programs")
	}
	if _, err := takotest.Build(); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                dir,
		Cmds:               commands,
		Setup:              setup,
		Condition:          condition,
		RequireUniqueNames: true,
	})
}

type serverKey struct{}

func setup(env *testscript.Env) error {
	root, err := takotest.Root()
	if err != nil {
		return err
	}
	s, err := takotest.New(takotest.Options{})
	if err != nil {
		return err
	}
	env.Values[serverKey{}] = s
	env.Defer(func() {
		if err := s.Close(); err != nil {
			env.T().Log("the server's log:\n" + s.Log())
			env.T().Fatal(err)
		}
	})
	for name, value := range map[string]string{
		"ROOT": root, "SOCKET": s.Socket, "DATA": s.Data, "DIR": s.Dir,
		"HTTP": strconv.Itoa(s.HTTP), "HTTPS": strconv.Itoa(s.HTTPS),
	} {
		env.Setenv(name, value)
	}
	return nil
}

// condition knows [root], and [prog:NAME] for a program in PATH.
func condition(cond string) (bool, error) {
	if cond == "root" {
		return os.Geteuid() == 0, nil
	}
	if name, ok := strings.CutPrefix(cond, "prog:"); ok {
		_, err := exec.LookPath(name)
		return err == nil, nil
	}
	return false, fmt.Errorf("unknown condition %q", cond)
}

func server(ts *testscript.TestScript) *takotest.Server {
	return ts.Value(serverKey{}).(*takotest.Server)
}

// outcome holds a command to what the script expects of it.
func outcome(ts *testscript.TestScript, neg bool, err error) {
	switch {
	case neg && err == nil:
		ts.Fatalf("it worked and should not")
	case !neg && err != nil:
		ts.Fatalf("%v\nthe server's log:\n%s", err, server(ts).Log())
	case err != nil:
		ts.Logf("%v", err)
	}
}

// cmdServer is: server start|stop|kill|log|exit CODE
func cmdServer(ts *testscript.TestScript, neg bool, args []string) {
	s := server(ts)
	if len(args) == 0 {
		ts.Fatalf("usage: server start [FLAG...] | stop | kill | log | exit CODE")
	}
	var err error
	switch args[0] {
	case "start":
		s.SetFlags(args[1:]...)
		err = s.Start()
	case "stop":
		err = s.Stop()
	case "kill":
		err = s.Kill()
	case "log":
		_, err = io.WriteString(ts.Stdout(), s.Log())
	case "exit":
		want, convErr := strconv.Atoi(args[1])
		ts.Check(convErr)
		var code int
		if code, err = s.Exit(); err == nil && code != want {
			err = fmt.Errorf("tako-master ended with %d, want %d", code, want)
		}
	default:
		ts.Fatalf("server %s is not a word of scripts", args[0])
	}
	outcome(ts, neg, err)
}

// cmdTakoctl is: takoctl ARG...
// Output and exit status are the real ones.
func cmdTakoctl(ts *testscript.TestScript, neg bool, args []string) {
	s := server(ts)
	err := ts.Exec(s.Program("takoctl"), append([]string{"--socket", s.Socket}, args...)...)
	outcome(ts, neg, err)
}

// cmdApp is: app DIR [KEY=JSON...] [-- FLAG...]
// It makes a test app in DIR with these fields of app.json and these flags.
func cmdApp(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 || neg {
		ts.Fatalf("usage: app DIR [KEY=JSON...] [-- FLAG...]")
	}
	fields, flags := args[1:], []string(nil)
	if i := slices.Index(fields, "--"); i >= 0 {
		fields, flags = fields[:i], fields[i+1:]
	}
	manifest := make(map[string]any)
	for _, f := range fields {
		key, value, _ := strings.Cut(f, "=")
		manifest[key] = rawJSON(value)
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.RemoveAll(dir))
	ts.Check(takotest.WriteApp(dir, manifest, flags...))
}

type rawJSON string

func (r rawJSON) MarshalJSON() ([]byte, error) { return []byte(r), nil }

// cmdExample is: example NAME DIR
// It copies examples/NAME to DIR.
func cmdExample(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 || neg {
		ts.Fatalf("usage: example NAME DIR")
	}
	ts.Check(os.CopyFS(ts.MkAbs(args[1]), os.DirFS(filepath.Join(ts.Getenv("ROOT"), "examples", args[0]))))
}

// cmdGet is: get [-p http/1.1|https|h2] [-X METHOD] [-H 'Name: value'] [-d BODY] [-wait] HOST/PATH [STATUS]
// It prints protocol, status, headers in order of their names, and body. -wait
// asks again until STATUS is answered. Without STATUS any below 500 is good.
func cmdGet(ts *testscript.TestScript, neg bool, args []string) {
	f := flag.NewFlagSet("get", flag.ContinueOnError)
	proto := f.String("p", string(takotest.TLS1), "")
	method := f.String("X", http.MethodGet, "")
	body := f.String("d", "", "")
	wait := f.Bool("wait", false, "")
	header := make(http.Header)
	f.Func("H", "", func(s string) error {
		name, value, _ := strings.Cut(s, ":")
		header.Add(name, strings.TrimSpace(value))
		return nil
	})
	ts.Check(f.Parse(args))
	if f.NArg() < 1 || f.NArg() > 2 {
		ts.Fatalf("usage: get [FLAG...] HOST/PATH [STATUS]")
	}
	want := f.Arg(1)

	s := server(ts)
	client := s.Client(takotest.Protocol(*proto))
	defer client.CloseIdleConnections()
	ask := func() (takotest.Answer, error) {
		req, err := http.NewRequestWithContext(context.Background(), *method, s.URL(takotest.Protocol(*proto), f.Arg(0)), strings.NewReader(*body))
		if err != nil {
			return takotest.Answer{}, err
		}
		maps.Copy(req.Header, header)
		a, err := takotest.Do(client, req)
		switch {
		case err != nil:
		case want == "" && a.StatusCode >= 500:
			err = fmt.Errorf("answered %s", a.Status)
		case want != "" && want != strconv.Itoa(a.StatusCode):
			err = fmt.Errorf("answered %s, want %s", a.Status, want)
		}
		return a, err
	}
	deadline := time.Now().Add(takotest.StartWait)
	answer, err := ask()
	for *wait && err != nil && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
		answer, err = ask()
	}
	if answer.Response != nil {
		var head bytes.Buffer
		ts.Check(answer.Header.Write(&head))
		fmt.Fprintf(ts.Stdout(), "%s %s\n%s\n%s", answer.Proto, answer.Status, strings.ReplaceAll(head.String(), "\r", ""), answer.Text)
	}
	outcome(ts, neg, err)
}

// cmdSay is: say LINE
// It sends LINE to the management socket as it is and prints the reply: its
// data, or its error.
func cmdSay(ts *testscript.TestScript, neg bool, args []string) {
	r, err := server(ts).Say([]byte(strings.Join(args, " ") + "\n"))
	if err == nil && r.Status != "ok" {
		err = fmt.Errorf("%s", r.Message)
		fmt.Fprintln(ts.Stderr(), r.Message)
	} else if err == nil {
		fmt.Fprintln(ts.Stdout(), string(r.Data))
	}
	outcome(ts, neg, err)
}
