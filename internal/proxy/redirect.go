package proxy

import (
	"net/http"
	"strconv"

	"tako/internal/proxy/message"
)

// redirect sends a client from plain HTTP to HTTPS, keeping method and body.
func redirect(x message.Exchange, port uint16) {
	r := x.Request()
	name, _, ok := message.ParseHost(r.Host)
	if !ok { // a client of HTTP/1.0 need not say it
		answer(x, http.StatusBadRequest, "Bad Request")
		return
	}
	to := append([]byte("https://"), name...)
	if port != 443 {
		to = strconv.AppendUint(append(to, ':'), uint64(port), 10)
	}
	if r.Target[0] == '*' {
		to = append(to, '/')
	} else {
		to = append(to, r.Target...)
	}
	answer(x, http.StatusTemporaryRedirect, "Redirecting to HTTPS",
		message.Field{ID: message.Location, Name: nameLocation, Value: to},
		message.Field{ID: message.CacheControl, Name: nameCacheControl, Value: noStore})
}
