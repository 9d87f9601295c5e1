package h2

import (
	"bytes"
	"hash/maphash"
	"unsafe"

	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

// tableSize bounds the dynamic tables of HPACK in both directions, in bytes as
// RFC 7541, 4.1, counts them.
const tableSize = 4096

// entryCost is what an entry of the table costs beside its bytes (RFC 7541, 4.1).
const entryCost = 32

// encoder writes field lines by HPACK (RFC 7541). It takes views and keeps none
// of them: what goes into its table is copied. A field goes into the table when
// it is seen for the second time, so that values which never come again do not
// push out those that do. It is used in the order in which blocks are sent.
type encoder struct {
	entries []entry // the newest is the last
	size    int
	max     int
	resized bool // to be told at the beginning of the next block
	seen    [64]uint32
}

type entry struct {
	hash uint64
	name int // its length in data
	data []byte
}

func (e *encoder) init() { e.max = tableSize }

// resize takes the peer's SETTINGS_HEADER_TABLE_SIZE. Of several before a block
// the least counts, which one update can tell: decoders are about that refuse a
// second one.
func (e *encoder) resize(n uint32) {
	size := int(min(n, tableSize))
	if size == e.max || e.resized && size > e.max {
		return
	}
	e.resized, e.max = true, size
	e.evict(0)
}

func (e *encoder) evict(room int) {
	n := 0
	for ; n < len(e.entries) && e.size+room > e.max; n++ {
		e.size -= len(e.entries[n].data) + entryCost
	}
	if n > 0 {
		k := copy(e.entries, e.entries[n:])
		clear(e.entries[k:])
		e.entries = e.entries[:k]
	}
}

// begin appends what must stand at the beginning of a block.
func (e *encoder) begin(b []byte) []byte {
	if e.resized {
		e.resized = false
		b = appendInt(b, 0x20, 5, uint64(e.max)) //nolint:gosec // not negative
	}
	return b
}

// status appends :status.
func (e *encoder) status(b []byte, status int) []byte {
	for i, s := range [...]int{200, 204, 206, 304, 400, 404, 500} {
		if s == status {
			return append(b, 0x88+byte(i)) //nolint:gosec // below 7
		}
	}
	return append(b, 0x08, 3, '0'+byte(status/100), '0'+byte(status/10%10), '0'+byte(status%10)) //nolint:gosec // digits
}

var hashSeed = maphash.MakeSeed()

// field appends one field. Name is in lower case.
func (e *encoder) field(b []byte, id message.ID, name, value []byte) []byte {
	switch id { //nolint:exhaustive // the others may be indexed
	case message.SetCookie, message.Authorization, message.ProxyAuthenticate:
		return appendLiteral(b, 0x10, 4, name, value) // never indexed (RFC 7541, 7.1.3)
	case message.ContentLength, message.ETag, message.XRequestID, message.Age, message.Location:
		return appendLiteral(b, 0, 4, name, value) // of another value each time
	}
	hash := maphash.Bytes(hashSeed, name)*31 + maphash.Bytes(hashSeed, value)
	for i := len(e.entries) - 1; i >= 0; i-- {
		n := &e.entries[i]
		if n.hash == hash && n.name == len(name) && bytes.Equal(n.data[:n.name], name) && bytes.Equal(n.data[n.name:], value) {
			return appendInt(b, 0x80, 7, uint64(len(staticNames)+len(e.entries)-i)) //nolint:gosec // positive
		}
	}
	if static := staticField(name, value); static != 0 {
		return append(b, 0x80|static)
	}
	slot, mark := &e.seen[hash%uint64(len(e.seen))], uint32(hash>>32)|1
	cost := len(name) + len(value) + entryCost
	if *slot != mark || cost > e.max/2 {
		*slot = mark
		return appendLiteral(b, 0, 4, name, value)
	}
	b = appendLiteral(b, 0x40, 6, name, value)
	e.evict(cost)
	data := make([]byte, 0, len(name)+len(value))
	data = append(append(data, name...), value...)
	e.entries = append(e.entries, entry{hash: hash, name: len(name), data: data})
	e.size += cost
	return b
}

func appendLiteral(b []byte, first byte, prefix uint, name, value []byte) []byte {
	if i := staticName[string(name)]; i != 0 {
		b = appendInt(b, first, prefix, uint64(i))
	} else {
		b = appendString(append(b, first), name)
	}
	return appendString(b, value)
}

// appendInt appends an integer with a prefix of that many bits (RFC 7541, 5.1).
func appendInt(b []byte, first byte, prefix uint, n uint64) []byte {
	most := uint64(1)<<prefix - 1
	if n < most {
		return append(b, first|byte(n)) //nolint:gosec // below 128
	}
	b = append(b, first|byte(most)) //nolint:gosec // below 128
	for n -= most; n >= 128; n >>= 7 {
		b = append(b, 0x80|byte(n)) //nolint:gosec // its low bits
	}
	return append(b, byte(n)) //nolint:gosec // below 128
}

// appendString appends a string literal, Huffman coded if that is shorter.
func appendString(b, s []byte) []byte {
	text := unsafe.String(unsafe.SliceData(s), len(s)) // read before we return, and kept by nobody
	if n := hpack.HuffmanEncodeLength(text); n < uint64(len(s)) {
		return hpack.AppendHuffmanString(appendInt(b, 0x80, 7, n), text)
	}
	return append(appendInt(b, 0, 7, uint64(len(s))), s...)
}

// staticNames are the names of the static table that answers use, by index less
// one (RFC 7541, appendix A); those of requests are left empty.
var staticNames = [61]string{
	13: "", 14: "accept-charset", 15: "accept-encoding", 16: "accept-language", 17: "accept-ranges", 18: "accept",
	19: "access-control-allow-origin", 20: "age", 21: "allow", 22: "authorization", 23: "cache-control",
	24: "content-disposition", 25: "content-encoding", 26: "content-language", 27: "content-length",
	28: "content-location", 29: "content-range", 30: "content-type", 31: "cookie", 32: "date", 33: "etag", 34: "expect",
	35: "expires", 36: "from", 37: "host", 38: "if-match", 39: "if-modified-since", 40: "if-none-match", 41: "if-range",
	42: "if-unmodified-since", 43: "last-modified", 44: "link", 45: "location", 46: "max-forwards",
	47: "proxy-authenticate", 48: "proxy-authorization", 49: "range", 50: "referer", 51: "refresh", 52: "retry-after",
	53: "server", 54: "set-cookie", 55: "strict-transport-security", 56: "transfer-encoding", 57: "user-agent", 58: "vary",
	59: "via", 60: "www-authenticate",
}

var staticName = func() map[string]uint8 {
	m := make(map[string]uint8)
	for i, name := range staticNames {
		if name != "" {
			m[name] = uint8(i + 1) //nolint:gosec // below 62
		}
	}
	return m
}()

// staticField is the index of a whole field of the static table that has a value.
func staticField(name, value []byte) byte {
	if string(name) == "accept-encoding" && string(value) == "gzip, deflate" {
		return 16
	}
	return 0
}
