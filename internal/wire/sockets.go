package wire

import (
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

// Dial asks for a connection to an instance that listens on TCP.
type Dial struct {
	Instance tako.InstanceID `json:"instance"`
}

// Dialed answers Dial with one connected descriptor, which the proxy owns.
type Dialed struct{}
