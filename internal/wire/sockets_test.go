package wire

import (
	"encoding/json"
	"reflect"
	"testing"
)

// The same without ways of their own.
type (
	jsonSign   Sign
	jsonSigned Signed
)

func FuzzPlainBodiesAreTheirJSON(f *testing.F) {
	for _, seed := range []string{
		`{"key":"aGVsbG8=","algorithm":"ecdsa","digest":"d29ybGQ="}`,
		`{"key":"","algorithm":"rsa-pss","digest":""}`,
		`{"key":"aGVsbG8","algorithm":"ecdsa","digest":"d29ybGQ="}`,
		`{"key":"aGVs\nbG8=","algorithm":"ecdsa","digest":"d29ybGQ="}`,
		"{\"key\":\"aGVs\nbG8=\",\"algorithm\":\"ecdsa\",\"digest\":\"d29ybGQ=\"}",
		`{"key":"aGVsbG8=","algorithm":"none","digest":"d29ybGQ="}`,
		`{"key":"aGVsbG8=","algorithm":"ecdsa","digest":"d29ybGQ=","digest":"aGVsbG8="}`,
		`{"key":"aGVsbG8=","algorithm":"ecdsa","digest":"d29ybGQ="}{}`,
		`{"digest":"aGVsbG8=","algorithm":"ecdsa","key":"d29ybGQ="}`,
		`{"signature":"aGVsbG8="}`, `{"signature":null}`, `{"signature":"aGVsbG8="} `, `{"signature":"aGVsbG8\u003d"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		// What is read without JSON, JSON reads the same.
		for _, both := range [][2]any{{new(Sign), new(jsonSign)}, {new(Signed), new(jsonSigned)}} {
			ours, theirs := both[0].(plain), both[1]
			if !ours.decodePlain(text) {
				continue
			}
			if err := decode(text, theirs); err != nil {
				t.Fatalf("%q is read, and JSON does not: %v", text, err)
			}
			want := reflect.ValueOf(theirs).Elem().Convert(reflect.TypeOf(ours).Elem()).Interface()
			if got := reflect.ValueOf(ours).Elem().Interface(); !reflect.DeepEqual(got, want) {
				t.Fatalf("%q is read as %+v, by JSON as %+v", text, got, want)
			}
		}
		// What is written without JSON, JSON writes the same, and it is read again.
		for _, body := range []plain{
			&Sign{Key: text, Algorithm: SignRSAPSS, Digest: text}, &Sign{Key: text, Algorithm: SignAlgorithm(text), Digest: text}, &Sign{}, &Signed{Signature: text}, &Signed{},
		} {
			b := body.appendPlain(nil)
			want, err := json.Marshal(body)
			if err != nil || b != nil && string(b) != string(want) {
				t.Fatalf("%+v is written as %q, by JSON as %q, %v", body, b, want, err)
			}
			again := reflect.New(reflect.TypeOf(body).Elem()).Interface()
			if b != nil && (!again.(plain).decodePlain(b) || !reflect.DeepEqual(again, body)) {
				t.Fatalf("%+v is read again as %+v", body, again)
			}
		}
	})
}
