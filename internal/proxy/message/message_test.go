package message

import (
	"strings"
	"testing"
)

func TestEveryNamedFieldIsFoundInAnyCase(t *testing.T) {
	longest := 0
	for id := Other + 1; id < Disguised; id++ {
		name := id.String()
		longest = max(longest, len(name))
		for _, s := range []string{name, strings.ToUpper(name), strings.ToTitle(name[:1]) + name[1:]} {
			if got := Lookup([]byte(s)); got != id {
				t.Errorf("%s: %d, want %d", s, got, id)
			}
		}
		if got := Lookup([]byte(name + "x")); got == id {
			t.Errorf("%sx is taken for %s", name, name)
		}
	}
	if longest > longestName {
		t.Errorf("longestName is %d, it should be %d", longestName, longest)
	}
}

// What has '_' for '-' in the name of any field with an ID is that field to some
// servers.
func TestNamesThatReadLikeOthersAreDisguised(t *testing.T) {
	for id := Other + 1; id < Disguised; id++ {
		name := id.String()
		for i := range name {
			if name[i] != '-' {
				continue
			}
			for _, s := range []string{name[:i] + "_" + name[i+1:], strings.ToUpper(strings.ReplaceAll(name, "-", "_"))} {
				if got := Lookup([]byte(s)); got != Disguised || got.InTrailer() {
					t.Errorf("%s: %d, want %d", s, got, Disguised)
				}
			}
		}
	}
	for name, want := range map[string]ID{
		"X_Forwarded_For": Disguised, "x-forwarded_proto": Disguised, "X-Real_IP": Disguised, "X_Request_Id": Disguised,
		"Transfer_Encoding": Disguised, "content_length": Disguised, "Proxy_Authorization": Disguised,
		"X-Forwarded": Disguised, "x_forwarded": Disguised, "X-Forwarded-Ssl": Disguised, "x_forwarded_client_cert_that_is_long": Disguised,
		"X-Forwardedly": Other, "X-Forwarde": Other, "X_Custom": Other, "F": Other, "_": Other, "Host_": Other, "xforwardedfor-0": Other, "Forwarde_": Other,
		"Content_Length_": Other, "Content__Length": Other, "": Other, "a_name_that_is_longer_than_all_of_these": Other,
		"sec_websocket_version" + "_more": Other,
	} {
		if got := Lookup([]byte(name)); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
}

func TestParseHost(t *testing.T) {
	for host, want := range map[string][2]string{
		"example.com": {"example.com", ""}, "A_b-c.example:8080": {"A_b-c.example", "8080"}, "[::1]": {"[::1]", ""},
		"[2001:db8::1]:443": {"[2001:db8::1]", "443"}, "127.0.0.1:1": {"127.0.0.1", "1"}, "h:": {"h", ""},
		strings.Repeat("a", 255): {strings.Repeat("a", 255), ""},
	} {
		name, port, ok := ParseHost([]byte(host))
		if !ok || string(name) != want[0] || string(port) != want[1] {
			t.Errorf("%q: %q %q %v", host, name, port, ok)
		}
	}
	for _, host := range []string{
		"", ":80", "a b", "user@host", "a/b", "[::1", "[::1]x", "[1.2.3.4]", "[fe80::1%25eth0]", "h:0", "h:65536", "h:+1", "h:1:2", "h:0x1",
		"a\x00b", "h\xc3\xa9", strings.Repeat("a", 256), "h:100000000000000000000",
	} {
		if name, port, ok := ParseHost([]byte(host)); ok {
			t.Errorf("%q: %q %q", host, name, port)
		}
	}
}

func TestTokensOfAList(t *testing.T) {
	for list, want := range map[string]bool{
		"close": true, "Keep-Alive, CLOSE": true, " \tclose\t ,x": true, "closed": false, "": false, ",": false, "not close": false,
	} {
		if got := HasToken([]byte(list), "close"); got != want {
			t.Errorf("%q: %v", list, got)
		}
	}
}

func TestSyntaxOfTargetsAndValues(t *testing.T) {
	for target, want := range map[string]bool{
		"/": true, "*": true, "/a?b=c": true, "/a|b": true, "": false, "a": false, "/a b": false, "/a#b": false, "/\x00": false,
		"/\xc3\xa9": false, "**": false, "/a\r": false, "/\x7f": false,
	} {
		if got := ValidTarget([]byte(target)); got != want {
			t.Errorf("target %q: %v", target, got)
		}
	}
	for value, want := range map[string]bool{"": true, "a\tb c": true, "\xff": true, "a\r": false, "a\nb": false, "\x00": false, "\x7f": false, "\x1b": false} {
		if got := ValidValue([]byte(value)); got != want {
			t.Errorf("value %q: %v", value, got)
		}
	}
}
