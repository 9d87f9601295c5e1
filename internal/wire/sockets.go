package wire

import (
	"bytes"
	"encoding/base64"

	"tako/internal/tako"
)

// The signing and the dialling socket stand beside the control channel, so that
// either can move to a process of its own without a change to the proxy. On
// both, the proxy asks and the other side answers with the same id; answers may
// overtake each other.
//
//	proxy                       master          proxy                        agent
//	  | -- Sign -------------->   |               | -- Dial -------------->    |
//	  | <- Signed or Fault ----   |               | <- Dialed (1 FD) or Fault  |

// Sign asks for a signature by a certificate's key. It names the key by the
// SHA-256 of its public half (SubjectPublicKeyInfo, DER); the master refuses
// keys it does not serve, other algorithms, and digests of the wrong length.
type Sign struct {
	Key       []byte        `json:"key"` // 32 bytes
	Algorithm SignAlgorithm `json:"algorithm"`
	Digest    []byte        `json:"digest"` // 32, 48 or 64 bytes
}

// SignAlgorithm is how to sign.
type SignAlgorithm string

// The algorithms that TLS 1.2 and 1.3 servers sign with.
const (
	SignECDSA    SignAlgorithm = "ecdsa"     // ASN.1
	SignRSAPSS   SignAlgorithm = "rsa-pss"   // salt as long as the digest
	SignRSAPKCS1 SignAlgorithm = "rsa-pkcs1" // TLS 1.2 only
)

// Signed answers Sign.
type Signed struct {
	Signature []byte `json:"signature"`
}

const (
	signKey       = `{"key":"`
	signAlgorithm = `","algorithm":"`
	signDigest    = `","digest":"`
	signedBegin   = `{"signature":"`
	plainEnd      = `"}`
)

func (s *Sign) appendPlain(b []byte) []byte {
	if s.Key == nil || s.Digest == nil || knownAlgorithm([]byte(s.Algorithm)) == "" {
		return nil
	}
	b = base64.StdEncoding.AppendEncode(append(b, signKey...), s.Key)
	b = append(append(b, signAlgorithm...), s.Algorithm...)
	b = base64.StdEncoding.AppendEncode(append(b, signDigest...), s.Digest)
	return append(b, plainEnd...)
}

func (s *Sign) decodePlain(b []byte) bool {
	b, begins := bytes.CutPrefix(b, []byte(signKey))
	key, b, hasAlgorithm := bytes.Cut(b, []byte(signAlgorithm))
	algorithm, b, hasDigest := bytes.Cut(b, []byte(signDigest))
	digest, ends := bytes.CutSuffix(b, []byte(plainEnd))
	if !begins || !hasAlgorithm || !hasDigest || !ends {
		return false
	}
	read := Sign{Algorithm: knownAlgorithm(algorithm)}
	var ok [2]bool
	read.Key, ok[0] = decodeBase64(key)
	read.Digest, ok[1] = decodeBase64(digest)
	if !ok[0] || !ok[1] || read.Algorithm == "" {
		return false
	}
	*s = read
	return true
}

func (s *Signed) appendPlain(b []byte) []byte {
	if s.Signature == nil {
		return nil
	}
	b = base64.StdEncoding.AppendEncode(append(b, signedBegin...), s.Signature)
	return append(b, plainEnd...)
}

func (s *Signed) decodePlain(b []byte) bool {
	b, begins := bytes.CutPrefix(b, []byte(signedBegin))
	b, ends := bytes.CutSuffix(b, []byte(plainEnd))
	signature, ok := decodeBase64(b)
	if !begins || !ends || !ok {
		return false
	}
	s.Signature = signature
	return true
}

// knownAlgorithm returns "" for one that is none.
func knownAlgorithm(b []byte) SignAlgorithm {
	for _, a := range [...]SignAlgorithm{SignECDSA, SignRSAPSS, SignRSAPKCS1} {
		if string(b) == string(a) {
			return a
		}
	}
	return ""
}

// decodeBase64 decodes text without breaks, which package base64 would leave out.
func decodeBase64(b []byte) ([]byte, bool) {
	if bytes.ContainsAny(b, "\r\n") {
		return nil, false
	}
	out, err := base64.StdEncoding.AppendDecode([]byte{}, b)
	return out, err == nil
}

// Dial asks for a connection to an instance that listens on TCP.
type Dial struct {
	Instance tako.InstanceID `json:"instance"`
}

// Dialed answers Dial with one connected descriptor, which the proxy owns.
type Dialed struct{}
