package proxy

import (
	"crypto/x509"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// What an app may take for a field that means something here does not reach it,
// whoever sends it and by what protocol; other names with '_' do.
func TestFieldsThatReadLikeOthersAreDropped(t *testing.T) {
	for _, trusted := range [][]string{nil, {"127.0.0.0/8"}} {
		m := serving(t, trusted...)
		cert, leaf := m.certificate("blog", true, "blog.test")
		m.send(cert)
		roots := x509.NewCertPool()
		roots.AddCert(leaf)
		came := make(chan http.Header, 1)
		m.plainApp(served(t, func(_ http.ResponseWriter, r *http.Request) { came <- r.Header.Clone() }))
		for _, h2 := range []bool{false, true} {
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://blog.test/", strings.NewReader("0\r\n\r\n"))
			if h2 {
				req.URL.Scheme = "https"
			}
			for _, name := range []string{
				"Transfer_Encoding", "Content_Length", "Host_", "X_Custom", "X_Real_IP", "Proxy_Authorization", "X_Forwarded", "HTTP2_Settings", "Content_Type",
			} {
				req.Header[name] = []string{"chunked"}
			}
			resp, err := m.client(h2, roots).Do(req)
			text(t, resp, err)
			if h2 != (resp.ProtoMajor == 2) {
				t.Fatalf("it was %s", resp.Proto)
			}
			var got []string
			for name := range maps.Keys(<-came) {
				if strings.Contains(name, "_") {
					got = append(got, strings.ToLower(name))
				}
			}
			slices.Sort(got)
			if want := []string{"host_", "x_custom"}; !slices.Equal(got, want) {
				t.Errorf("%s, trusted %v: the app sees %q, want %q", resp.Proto, trusted, got, want)
			}
		}
	}
}
