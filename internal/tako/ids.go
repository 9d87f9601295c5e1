package tako

import (
	"fmt"
	"strconv"
	"strings"
)

// Bounds of ids, in bytes.
const (
	MaxAppID     = 63
	MaxReleaseID = 128
)

// AppID names an app: 1 to 63 bytes of a–z, 0–9 and '-', beginning with a
// letter and not ending in '-', so that it is also a DNS label and a safe file
// name.
type AppID string

// ParseAppID makes an AppID. The error is a CodeInvalid Error whose text is part
// of the management protocol.
func ParseAppID(s string) (AppID, error) {
	bad := func(why string) (AppID, error) {
		return "", Errorf(CodeInvalid, "Invalid app name: %s", why)
	}
	switch {
	case s == "":
		return bad("must not be empty")
	case len(s) > MaxAppID:
		return bad("must be 63 characters or fewer")
	case s[0] < 'a' || s[0] > 'z':
		return bad("must start with a lowercase letter")
	case s[len(s)-1] == '-':
		return bad("must not end with '-'")
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return bad("only lowercase letters, digits, and '-' are allowed")
		}
	}
	return AppID(s), nil
}

// ReleaseID names one version of an app on disk: 1 to 128 bytes of ASCII
// letters, digits, '-', '_' and '.', neither "." nor "..".
type ReleaseID string

// ParseReleaseID makes a ReleaseID. The error is a CodeInvalid Error whose text
// is part of the management protocol.
func ParseReleaseID(s string) (ReleaseID, error) {
	bad := func(why string) (ReleaseID, error) {
		return "", Errorf(CodeInvalid, "Invalid release version: %s", why)
	}
	switch {
	case s == "":
		return bad("must not be empty")
	case len(s) > MaxReleaseID:
		return bad("must be 128 characters or fewer")
	case s == "." || s == "..":
		return bad("'.' and '..' are not allowed")
	case strings.ContainsAny(s, `/\`):
		return bad("path separators are not allowed")
	}
	for i := range len(s) {
		c := s[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return bad("only letters, digits, '.', '_' and '-' are allowed")
		}
	}
	return ReleaseID(s), nil
}

// InstanceID names one process of an app. Numbers count from 1 per app and are
// not used again while the server runs. Its text is "blog.3".
type InstanceID struct {
	App AppID
	N   uint32
}

// String returns "app.n".
func (id InstanceID) String() string {
	return string(id.App) + "." + strconv.FormatUint(uint64(id.N), 10)
}

// MarshalText is String, so that an InstanceID may be a JSON string or map key.
func (id InstanceID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText is ParseInstanceID.
func (id *InstanceID) UnmarshalText(b []byte) error {
	got, err := ParseInstanceID(string(b))
	if err != nil {
		return err
	}
	*id = got
	return nil
}

// ParseInstanceID reads the text that String writes, and no other.
func ParseInstanceID(s string) (InstanceID, error) {
	app, num, ok := strings.Cut(s, ".")
	if !ok {
		return InstanceID{}, fmt.Errorf("instance id %q: want app.number", s)
	}
	a, err := ParseAppID(app)
	if err != nil {
		return InstanceID{}, fmt.Errorf("instance id %q: %w", s, err)
	}
	n, err := strconv.ParseUint(num, 10, 32)
	if err != nil || n == 0 || num[0] == '0' || num[0] == '+' {
		return InstanceID{}, fmt.Errorf("instance id %q: the number is not one from 1 to 4294967295", s)
	}
	return InstanceID{App: a, N: uint32(n)}, nil
}
