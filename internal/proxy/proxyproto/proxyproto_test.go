package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// v2 makes a header of version 2.
func v2(versionAndCommand, family byte, body string) string {
	b := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), versionAndCommand, family)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return string(b) + body
}

const (
	tcp4 = "\xc0\x00\x02\x01\xc6\x33\x64\x02\x30\x39\x01\xbb" // 192.0.2.1:12345 to 198.51.100.2:443
	ext  = "\x04\x00\x02ab\x20\x00\x00"
)

var (
	tcp6   = " \x01\r\xb8" + strings.Repeat("\x00", 11) + "\x01" + strings.Repeat("\x00", 15) + "\x01" + "\x30\x39\x01\xbb"
	mapped = strings.Repeat("\x00", 10) + "\xff\xff\xc0\x00\x02\x01" + strings.Repeat("\x00", 16) + "\x30\x39\x01\xbb"
)

// named is the client's address, "" if it is not told.
func named(c Client) string {
	switch {
	case c.Local && !c.Addr.IsValid():
		return "itself"
	case c == (Client{}):
		return ""
	}
	return c.Addr.String()
}

func TestHeadersNameTheClientAndNothingBehindThemIsRead(t *testing.T) {
	for header, want := range map[string]string{
		"PROXY TCP4 192.0.2.1 198.51.100.2 12345 443\r\n":                                                            "192.0.2.1:12345",
		"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n":                                                                         "0.0.0.0:0",
		"PROXY TCP6 2001:db8::1 ::1 65535 443\r\n":                                                                   "[2001:db8::1]:65535",
		"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 1 2\r\n":                                                       "192.0.2.1:1",
		"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n": "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
		"PROXY UNKNOWN\r\n": "",
		"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n": "",
		v2(0x21, 0x11, tcp4):                      "192.0.2.1:12345",
		v2(0x21, 0x11, tcp4+ext):                  "192.0.2.1:12345",
		v2(0x21, 0x21, tcp6):                      "[2001:db8::1]:12345",
		v2(0x21, 0x21, tcp6+ext):                  "[2001:db8::1]:12345",
		v2(0x21, 0x21, mapped):                    "192.0.2.1:12345",
		v2(0x21, 0x31, strings.Repeat("/", 216)):  "",
		v2(0x21, 0x00, ""):                        "",
		v2(0x21, 0x00, "anything"):                "",
		v2(0x20, 0x00, ""):                        "itself",
		v2(0x20, 0x11, tcp4):                      "itself",
		v2(0x20, 0xff, "anything"):                "itself",
		v2(0x21, 0x00, strings.Repeat("x", 4080)): "",
	} {
		for name, cut := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r }, "by bytes": iotest.OneByteReader,
		} {
			r := bytes.NewReader([]byte(header + "GET / HTTP/1.1\r\n"))
			got, err := read(cut(r))
			if rest, _ := io.ReadAll(r); named(got) != want || err != nil || string(rest) != "GET / HTTP/1.1\r\n" {
				t.Errorf("%.50q, %s: %+v, %v, left %q", header, name, got, err, rest)
			}
		}
		if got, err := read(iotest.DataErrReader(strings.NewReader(header))); named(got) != want || err != nil {
			t.Errorf("%.50q with nothing behind it: %+v, %v", header, got, err)
		}
		for i := range header {
			if _, err := read(strings.NewReader(header[:i])); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("the first %d bytes of %.50q: %v", i, header, err)
			}
		}
	}
}

func TestWhatIsNoHeaderIsRefused(t *testing.T) {
	for in, want := range map[string]error{
		"GET / HTTP/1.1\r\n\r\n":                            ErrNone,
		"\x16\x03\x01\x02\x00":                              ErrNone,
		"G":                                                 ErrNone,
		"\r\n\r\n\x00\r\nQUIX\n":                            ErrNone,
		"proxy TCP4 1.1.1.1 2.2.2.2 1 2\r\n":                ErrNone,
		"PROXYTCP4 1.1.1.1 2.2.2.2 1 2\r\n":                 ErrNone,
		"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\n":                  ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n":                  ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2 1 2 3\r\n":              ErrInvalid,
		"PROXY TCP4  1.1.1.1 2.2.2.2 1 2\r\n":               ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2 1 2 \r\n":               ErrInvalid,
		"PROXY TCP4 1.1.1.01 2.2.2.2 1 2\r\n":               ErrInvalid,
		"PROXY TCP4 1.1.1 2.2.2.2 1 2\r\n":                  ErrInvalid,
		"PROXY TCP4 ::1 ::1 1 2\r\n":                        ErrInvalid,
		"PROXY TCP4 1.1.1.1 ::1 1 2\r\n":                    ErrInvalid,
		"PROXY TCP6 1.1.1.1 2.2.2.2 1 2\r\n":                ErrInvalid,
		"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n":               ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2 65536 2\r\n":            ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2 01 2\r\n":               ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2 +1 2\r\n":               ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2 -1 2\r\n":               ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2 1 x\r\n":                ErrInvalid,
		"PROXY TCP4 1.1.1.1 2.2.2.2  2\r\n":                 ErrInvalid,
		"PROXY TCP4 1.1.1.1\r2.2.2.2 1 2\r\n":               ErrInvalid,
		"PROXY UDP4 1.1.1.1 2.2.2.2 1 2\r\n":                ErrInvalid,
		"PROXY tcp4 1.1.1.1 2.2.2.2 1 2\r\n":                ErrInvalid,
		"PROXY UNKNOWNS\r\n":                                ErrInvalid,
		"PROXY UNKN\r\nXXXXX\r\n":                           ErrInvalid,
		"PROXY \nUNKNOWN\r\n":                               ErrInvalid,
		"PROXY UNKNOWN " + strings.Repeat("x", 200):         ErrTooLong,
		"PROXY UNKNOWN " + strings.Repeat("x", 92) + "\r\n": ErrTooLong,
		v2(0x11, 0x11, tcp4):                                ErrInvalid,
		v2(0x31, 0x11, tcp4):                                ErrInvalid,
		v2(0x22, 0x11, tcp4):                                ErrInvalid,
		v2(0x21, 0x12, tcp4):                                ErrInvalid, // datagrams
		v2(0x21, 0x10, tcp4):                                ErrInvalid,
		v2(0x21, 0x41, tcp4):                                ErrInvalid,
		v2(0x21, 0x11, tcp4[:11]):                           ErrInvalid,
		v2(0x21, 0x21, tcp6[:35]):                           ErrInvalid,
		v2(0x21, 0x31, strings.Repeat("/", 215)):            ErrInvalid,
		v2(0x21, 0x11, tcp4+"\x04"):                         ErrInvalid,
		v2(0x21, 0x11, tcp4+"\x04\x00"):                     ErrInvalid,
		v2(0x21, 0x11, tcp4+"\x04\x00\x03ab"):               ErrInvalid,
		v2(0x21, 0x11, tcp4+strings.Repeat("x", 4069)):      ErrTooLong,
	} {
		if got, err := read(strings.NewReader(in)); !errors.Is(err, want) || got != (Client{}) {
			t.Errorf("%.60q: %+v, %v, want %v", in, got, err, want)
		}
	}
}

func TestSilentPeerIsNotWaitedForLonger(t *testing.T) {
	for _, sent := range []string{"", "PROXY TCP4 1.1.1.1", v2(0x21, 0x11, tcp4)[:20]} {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			defer a.Close()
			defer b.Close()
			go func() { _, _ = io.WriteString(b, sent) }()
			began := time.Now()
			if _, err := Read(a, began.Add(time.Second)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != time.Second {
				t.Errorf("%q: %v after %s", sent, err, time.Since(began))
			}
		})
	}
}

func TestDeadlineIsTakenOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		defer a.Close()
		go func() {
			defer b.Close()
			_, _ = io.WriteString(b, "PROXY TCP4 192.0.2.1 198.51.100.2 12345 443\r\n")
			time.Sleep(time.Hour)
			_, _ = io.WriteString(b, "late")
		}()
		client, err := Read(a, time.Now().Add(time.Second))
		if client != (Client{Addr: netip.MustParseAddrPort("192.0.2.1:12345")}) || err != nil {
			t.Errorf("%+v, %v", client, err)
		}
		if got, err := io.ReadAll(a); string(got) != "late" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// However a header is cut the same is read of it, never more than its limit, and
// what is a header can be written again as one that says the same.
func FuzzRead(f *testing.F) {
	for _, s := range []string{"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\nrest", "PROXY UNKNOWN x\r\n", v2(0x21, 0x11, tcp4+ext) + "rest", v2(0x21, 0x21, tcp6), v2(0x20, 0, "")} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		whole, bytewise := bytes.NewReader(b), bytes.NewReader(b)
		got, err := read(whole)
		again, err2 := read(iotest.OneByteReader(bytewise))
		if got != again || fmt.Sprint(err) != fmt.Sprint(err2) || err == nil && whole.Len() != bytewise.Len() {
			t.Fatalf("%q: %+v, %v, %d left; byte by byte %+v, %v, %d left", b, got, err, whole.Len(), again, err2, bytewise.Len())
		}
		used := len(b) - whole.Len()
		if used > MaxV2 || len(b) > 0 && b[0] == 'P' && used > MaxV1 {
			t.Errorf("%q: %d bytes were read", b, used)
		}
		if err != nil {
			if got != (Client{}) {
				t.Errorf("%q: %+v though %v", b, got, err)
			}
			return
		}
		if !got.Addr.IsValid() {
			return
		}
		if got.Local || got.Addr.Addr().Is4In6() || got.Addr.Addr().Zone() != "" {
			t.Errorf("%q: %+v", b, got)
		}
		family := "TCP6"
		if got.Addr.Addr().Is4() {
			family = "TCP4"
		}
		line := fmt.Sprintf("PROXY %s %s %s %d 1\r\n", family, got.Addr.Addr(), got.Addr.Addr(), got.Addr.Port())
		if same, err := read(strings.NewReader(line)); same != got || err != nil {
			t.Errorf("%q: %+v, but %q is %+v, %v", b, got, line, same, err)
		}
	})
}
