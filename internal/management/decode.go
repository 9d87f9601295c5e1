package management

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// args are the fields of every command. Which of them a command has, its row
// says.
type args struct {
	protocolVersion uint32
	app             string
	version         string
	path            string
	owner           string
	routes          []string
	secrets         map[string]string // nil when absent
	instances       uint8
	idleTimeout     uint32
	lines           uint32
	merge           bool
	force           bool
	follow          bool
	progress        bool
}

// A field is one field of a request: how it is called and read.
type field struct {
	name     string
	optional bool
	set      func(*args, json.RawMessage) error
}

func (f field) orAbsent() field { f.optional = true; return f }

// The fields, each of one type wherever it stands.
var (
	fProtocolVersion = field{name: "protocol_version", set: func(a *args, v json.RawMessage) error { return readUint(v, &a.protocolVersion) }}
	fApp             = field{name: "app", set: func(a *args, v json.RawMessage) error { return readString(v, &a.app) }}
	fVersion         = field{name: "version", set: func(a *args, v json.RawMessage) error { return readString(v, &a.version) }}
	fPath            = field{name: "path", set: func(a *args, v json.RawMessage) error { return readString(v, &a.path) }}
	fOwner           = field{name: "owner", set: func(a *args, v json.RawMessage) error { return readString(v, &a.owner) }}
	fRoutes          = field{name: "routes", set: func(a *args, v json.RawMessage) error { return readStrings(v, &a.routes) }}
	fSecrets         = field{name: "secrets", set: func(a *args, v json.RawMessage) error { return readMap(v, &a.secrets) }}
	fInstances       = field{name: "instances", set: func(a *args, v json.RawMessage) error { return readUint(v, &a.instances) }}
	fIdleTimeout     = field{name: "idle_timeout", set: func(a *args, v json.RawMessage) error { return readUint(v, &a.idleTimeout) }}
	fLines           = field{name: "lines", optional: true, set: func(a *args, v json.RawMessage) error { return readUint(v, &a.lines) }}
	fMerge           = field{name: "merge", optional: true, set: func(a *args, v json.RawMessage) error { return readBool(v, &a.merge) }}
	fForce           = field{name: "force", optional: true, set: func(a *args, v json.RawMessage) error { return readBool(v, &a.force) }}
	fFollow          = field{name: "follow", optional: true, set: func(a *args, v json.RawMessage) error { return readBool(v, &a.follow) }}
	fProgress        = field{name: "progress", optional: true, set: func(a *args, v json.RawMessage) error { return readBool(v, &a.progress) }}
)

// decode reads one request line. It is strict about types and about saying a
// thing twice; fields that the command does not have are passed over. The command
// is returned even with an error if its name was understood. An error never
// repeats the value of a secret.
func decode(line []byte) (*command, *args, error) {
	if len(bytes.TrimSpace(line)) == 0 {
		return nil, nil, errors.New("EOF while parsing a value")
	}
	if !utf8.Valid(line) {
		return nil, nil, errors.New("json line is not valid UTF-8")
	}
	if err := prescan(line); err != nil {
		return nil, nil, err
	}
	var whole json.RawMessage
	if err := json.Unmarshal(line, &whole); err != nil {
		return nil, nil, err
	}
	if whole[0] != '{' {
		return nil, nil, wrongType(whole, "an object with a `command`")
	}
	all, err := members(whole)
	if err != nil {
		return nil, nil, err
	}
	cmd, err := commandOf(all)
	if err != nil {
		return nil, nil, err
	}
	a := &args{lines: DefaultLogLines}
	seen := make(map[string]bool, len(cmd.fields))
	for _, m := range all {
		i := slices.IndexFunc(cmd.fields, func(f field) bool { return f.name == m.key })
		if i < 0 {
			continue
		}
		if seen[m.key] {
			return cmd, nil, fmt.Errorf("duplicate field `%s`", m.key)
		}
		seen[m.key] = true
		if err := cmd.fields[i].set(a, m.value); err != nil {
			return cmd, nil, fmt.Errorf("%w (field `%s`)", err, m.key)
		}
	}
	for _, f := range cmd.fields {
		if !f.optional && !seen[f.name] {
			return cmd, nil, fmt.Errorf("missing field `%s`", f.name)
		}
	}
	return cmd, a, nil
}

func commandOf(all []member) (*command, error) {
	var cmd *command
	for _, m := range all {
		if m.key != "command" {
			continue
		}
		if cmd != nil {
			return nil, errors.New("duplicate field `command`")
		}
		var name string
		if err := readString(m.value, &name); err != nil {
			return nil, fmt.Errorf("%w (field `command`)", err)
		}
		i := slices.IndexFunc(commands, func(c *command) bool { return c.name == name })
		if i < 0 {
			return nil, fmt.Errorf("unknown variant `%s`, expected one of %s", cut(name), commandNames)
		}
		cmd = commands[i]
	}
	if cmd == nil {
		return nil, errors.New("missing field `command`")
	}
	return cmd, nil
}

// prescan looks at what the JSON decoder would let pass: deep nesting, and
// escaped halves of surrogate pairs, which it would change without a word.
func prescan(b []byte) error {
	depth, inString := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case c == '"':
			inString = !inString
		case inString && c == '\\':
			i++
			if i >= len(b) || b[i] != 'u' {
				continue
			}
			r := hex4(b[i+1:])
			switch {
			case r >= 0xd800 && r < 0xdc00:
				if len(b) < i+7 || b[i+5] != '\\' || b[i+6] != 'u' {
					return errors.New("lone leading surrogate in hex escape")
				}
				if low := hex4(b[i+7:]); low < 0xdc00 || low > 0xdfff {
					return errors.New("lone leading surrogate in hex escape")
				}
				i += 10
			case r >= 0xdc00 && r <= 0xdfff:
				return errors.New("lone trailing surrogate in hex escape")
			}
		case inString:
		case c == '{' || c == '[':
			if depth++; depth > MaxDepth {
				return errors.New("recursion limit exceeded")
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return nil
}

// hex4 returns the number that four hex digits are, or 0.
func hex4(b []byte) uint64 {
	if len(b) < 4 {
		return 0
	}
	n, err := strconv.ParseUint(string(b[:4]), 16, 16)
	if err != nil {
		return 0
	}
	return n
}

type member struct {
	key   string
	value json.RawMessage
}

// members returns what an object holds, in order, keys that come twice included.
func members(object json.RawMessage) ([]member, error) {
	dec := json.NewDecoder(bytes.NewReader(object))
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	var all []member
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, err
		}
		var m member
		m.key, _ = key.(string) // the syntax was checked
		if err := dec.Decode(&m.value); err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, nil
}

func readString(v json.RawMessage, into *string) error {
	if v[0] != '"' {
		return wrongType(v, "a string")
	}
	return json.Unmarshal(v, into)
}

func readBool(v json.RawMessage, into *bool) error {
	if v[0] != 't' && v[0] != 'f' {
		return wrongType(v, "a boolean")
	}
	*into = v[0] == 't'
	return nil
}

func readUint[T uint8 | uint32](v json.RawMessage, into *T) error {
	bits := 8
	if ^T(0) != 255 {
		bits = 32
	}
	want := "u" + strconv.Itoa(bits)
	if (v[0] != '-' && (v[0] < '0' || v[0] > '9')) || bytes.ContainsAny(v, ".eE") {
		return wrongType(v, want)
	}
	n, err := strconv.ParseUint(string(v), 10, bits)
	if err != nil {
		return fmt.Errorf("invalid value: integer `%s`, expected %s", cut(string(v)), want)
	}
	*into = T(n)
	return nil
}

func readStrings(v json.RawMessage, into *[]string) error {
	if v[0] != '[' {
		return wrongType(v, "a sequence")
	}
	var items []json.RawMessage
	if err := json.Unmarshal(v, &items); err != nil {
		return err
	}
	*into = make([]string, len(items))
	for i, item := range items {
		if err := readString(item, &(*into)[i]); err != nil {
			return fmt.Errorf("%w at index %d", err, i)
		}
	}
	return nil
}

func readMap(v json.RawMessage, into *map[string]string) error {
	if v[0] != '{' {
		return fmt.Errorf("invalid type: %s, expected a map", kindOf(v))
	}
	all, err := members(v)
	if err != nil {
		return err
	}
	*into = make(map[string]string, len(all))
	for _, m := range all {
		if _, twice := (*into)[m.key]; twice {
			return fmt.Errorf("duplicate key `%s`", cut(m.key))
		}
		if m.value[0] != '"' {
			return fmt.Errorf("invalid type: %s, expected a string at key `%s`", kindOf(m.value), cut(m.key))
		}
		var s string
		if err := readString(m.value, &s); err != nil {
			return err
		}
		(*into)[m.key] = s
	}
	return nil
}

func wrongType(v json.RawMessage, want string) error {
	kind := kindOf(v)
	switch kind {
	case "integer", "floating point", "boolean":
		return fmt.Errorf("invalid type: %s `%s`, expected %s", kind, cut(string(v)), want)
	case "string":
		return fmt.Errorf("invalid type: string %s, expected %s", cut(string(v)), want)
	}
	return fmt.Errorf("invalid type: %s, expected %s", kind, want)
}

func kindOf(v json.RawMessage) string {
	switch v[0] {
	case '{':
		return "map"
	case '[':
		return "sequence"
	case '"':
		return "string"
	case 't', 'f':
		return "boolean"
	case 'n':
		return "null"
	}
	if bytes.ContainsAny(v, ".eE") {
		return "floating point"
	}
	return "integer"
}

// cut bounds what a text repeats of the request.
func cut(s string) string { return cutTo(s, maxQuoted) }

func cutTo(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "..."
}
