package release

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxDepth bounds the nesting of JSON values.
const maxDepth = 32

// decodeTree reads one JSON value: map[string]any, []any, string, json.Number,
// bool or nil. It is stricter than encoding/json alone: a key may come once in
// an object, nothing may follow the value, and the text is UTF-8.
func decodeTree(data []byte) (any, error) {
	if !utf8.Valid(data) {
		return nil, errors.New("it is not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	v, err := decodeValue(d, "", 0)
	if err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("the JSON ends too early")
		}
		return nil, err
	}
	end := d.InputOffset()
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("something follows the JSON value, which ends at byte %d", end)
	}
	return v, nil
}

// decodeValue reads the next value; at is its name for errors.
func decodeValue(d *json.Decoder, at string, depth int) (any, error) {
	t, err := d.Token()
	if err != nil {
		return nil, err
	}
	delim, ok := t.(json.Delim)
	if !ok {
		return t, nil
	}
	if depth == maxDepth {
		return nil, fmt.Errorf("field %q: values are nested deeper than %d", at, maxDepth)
	}
	if delim == '{' {
		object := make(map[string]any)
		for d.More() {
			t, err := d.Token()
			if err != nil {
				return nil, err
			}
			key, ok := t.(string)
			if !ok {
				return nil, fmt.Errorf("an object's key is not a string, before byte %d", d.InputOffset()+1)
			}
			name := join(at, key)
			if _, ok := object[key]; ok {
				return nil, fmt.Errorf("field %q: it is there twice; keep one", name)
			}
			if object[key], err = decodeValue(d, name, depth+1); err != nil {
				return nil, err
			}
		}
		_, err = d.Token() // the closing brace
		return object, err
	}
	list := []any{}
	for d.More() {
		v, err := decodeValue(d, element(at, len(list)), depth+1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	_, err = d.Token()
	return list, err
}

// maxName bounds the name of a field in an error.
const maxName = 200

// join names the field key of the object at.
func join(at, key string) string {
	if at != "" {
		key = at + "." + key
	}
	if len(key) > maxName {
		key = key[:maxName]
	}
	return key
}

// element names the i-th value of the list at.
func element(at string, i int) string { return at + "[" + strconv.Itoa(i) + "]" }

// kind is what people call the type of a value.
func kind(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case bool:
		return "a boolean"
	case json.Number:
		return "a number"
	case string:
		return "a string"
	case []any:
		return "a list"
	default:
		return "an object"
	}
}

// fault is the panic by which an object's readers end at the first wrong field.
type fault struct{ err error }

// object reads the fields of a JSON object. A field that is absent or null gives
// the default. A wrong one panics with a fault, which reading turns into an
// error.
type object struct {
	fields map[string]any
	at     string
}

// reading calls read and returns the error of the first wrong field.
func reading(read func()) (err error) {
	defer func() {
		switch f := recover().(type) {
		case nil:
		case fault:
			err = f.err
		default:
			panic(f)
		}
	}()
	read()
	return nil
}

// refuse ends the reading: the field is wrong, and why.
func refuse(name, format string, args ...any) {
	panic(fault{fmt.Errorf("field %q: %s", name, fmt.Sprintf(format, args...))})
}

func mismatch(name string, got any, want string) {
	refuse(name, "got %s, want %s", kind(got), want)
}

func (o object) has(key string) bool { return o.fields[key] != nil }

func (o object) name(key string) string { return join(o.at, key) }

// str returns a string without NUL.
func (o object) str(key, def string) string {
	if !o.has(key) {
		return def
	}
	return asString(o.name(key), o.fields[key])
}

func asString(name string, v any) string {
	s, ok := v.(string)
	if !ok {
		mismatch(name, v, "a string")
	}
	if strings.Contains(s, "\x00") {
		refuse(name, "it has a NUL byte in it; take it out")
	}
	return s
}

func (o object) boolean(key string, def bool) bool {
	if !o.has(key) {
		return def
	}
	b, ok := o.fields[key].(bool)
	if !ok {
		mismatch(o.name(key), o.fields[key], "a boolean")
	}
	return b
}

// number returns a number between low and high.
func (o object) number(key string, def, low, high float64) float64 {
	if !o.has(key) {
		return def
	}
	want := fmt.Sprintf("a number from %v to %v", low, high)
	n, ok := o.fields[key].(json.Number)
	if !ok {
		mismatch(o.name(key), o.fields[key], want)
	}
	f, err := n.Float64()
	if err != nil || f < low || f > high {
		refuse(o.name(key), "got %.40s, want %s", n, want)
	}
	return f
}

// integer returns a whole number between low and high.
func (o object) integer(key string, def, low, high int) int {
	if !o.has(key) {
		return def
	}
	return asInteger(o.name(key), o.fields[key], low, high)
}

func asInteger(name string, v any, low, high int) int {
	want := fmt.Sprintf("a whole number from %d to %d", low, high)
	n, ok := v.(json.Number)
	if !ok {
		mismatch(name, v, want)
	}
	i, err := strconv.Atoi(n.String())
	if err != nil || i < low || i > high {
		refuse(name, "got %.40s, want %s", n, want)
	}
	return i
}

// list returns the values of a list.
func (o object) list(key, want string) []any {
	if !o.has(key) {
		return nil
	}
	l, ok := o.fields[key].([]any)
	if !ok {
		mismatch(o.name(key), o.fields[key], want)
	}
	return l
}

// object returns the object in a field; one without fields if it is absent.
func (o object) object(key string) object {
	inner := object{at: o.name(key)}
	if o.has(key) {
		var ok bool
		if inner.fields, ok = o.fields[key].(map[string]any); !ok {
			mismatch(inner.at, o.fields[key], "an object")
		}
	}
	return inner
}
