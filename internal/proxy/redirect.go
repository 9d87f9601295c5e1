package proxy

import (
	"net/http"
	"net/netip"
	"strconv"
	"strings"
)

// splitHost takes the port off a Host field and reports whether the rest can
// stand in a URL. IPv6 addresses keep their brackets.
func splitHost(host string) (name string, ok bool) {
	var port string
	if strings.HasPrefix(host, "[") {
		end := strings.IndexByte(host, ']')
		if end < 0 {
			return "", false
		}
		name, port = host[:end+1], host[end+1:]
		addr, err := netip.ParseAddr(name[1:end])
		if err != nil || !addr.Is6() || addr.Zone() != "" || port != "" && port[0] != ':' {
			return "", false
		}
		port = strings.TrimPrefix(port, ":")
	} else {
		name, port, _ = strings.Cut(host, ":")
		if name == "" || len(name) > 255 {
			return "", false
		}
		for i := range len(name) {
			c := name[i]
			letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
			if !letter && c != '.' && c != '-' && c != '_' {
				return "", false
			}
		}
	}
	if port == "" {
		return name, true
	}
	for i := range len(port) {
		if port[i] < '0' || port[i] > '9' {
			return "", false
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return name, err == nil && n > 0
}

// target is the path and query of a request as the client wrote them, or "*".
func target(r *http.Request) string {
	if strings.HasPrefix(r.RequestURI, "/") || r.RequestURI == "*" {
		if i := strings.IndexByte(r.RequestURI, '#'); i >= 0 {
			return r.RequestURI[:i]
		}
		return r.RequestURI
	}
	return r.URL.RequestURI() // of the absolute form
}

// redirect sends a client from plain HTTP to HTTPS, keeping method and body.
func redirect(w http.ResponseWriter, r *http.Request, name, target string, port uint16) {
	if target == "*" {
		target = "/"
	}
	if port != 443 {
		name += ":" + strconv.Itoa(int(port))
	}
	w.Header().Set("Location", "https://"+name+target)
	w.Header().Set("Cache-Control", "no-store")
	answer(w, r, http.StatusTemporaryRedirect, "Redirecting to HTTPS")
}
