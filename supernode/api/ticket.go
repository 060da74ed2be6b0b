package api

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"

	"damselfly.dev/pieces"
)

// TicketLife is how long a ticket is good for; a host with a running task gets
// a new one at half of it.
const TicketLife = time.Hour

// Ticket is a supernode's word that a host may read a task. Who serves pieces
// asks for it on every request; it holds no credential of anybody.
type Ticket struct {
	Task    string `cbor:"1,keyasint"`
	Host    string `cbor:"2,keyasint"`
	Expires int64  `cbor:"3,keyasint"` // Unix seconds
}

// ErrTicket is returned for a ticket that is missing, malformed, forged,
// expired, or for another task.
var ErrTicket = errors.New("no valid ticket for this task")

// SignTicket returns t in its signed form, safe in a header.
func SignTicket(key ed25519.PrivateKey, t Ticket) (string, error) {
	body, err := cbor.Marshal(t)
	if err != nil {
		return "", fmt.Errorf("sign ticket: %w", err)
	}
	enc := base64.RawURLEncoding
	return enc.EncodeToString(body) + "." + enc.EncodeToString(ed25519.Sign(key, body)), nil
}

// VerifyTicket checks a signed ticket for task; any failure is ErrTicket.
func VerifyTicket(key ed25519.PublicKey, signed string, task pieces.TaskID, now time.Time) (Ticket, error) {
	var t Ticket
	b, s, ok := strings.Cut(signed, ".")
	if !ok || len(signed) > 1024 || len(key) != ed25519.PublicKeySize {
		return t, ErrTicket
	}
	enc := base64.RawURLEncoding
	body, err1 := enc.DecodeString(b)
	sig, err2 := enc.DecodeString(s)
	if err1 != nil || err2 != nil || !ed25519.Verify(key, body, sig) {
		return t, ErrTicket
	}
	dec, err := decMode()
	if err != nil {
		return t, err
	}
	if err := dec.Unmarshal(body, &t); err != nil || t.Task != string(task) || now.Unix() >= t.Expires {
		return Ticket{}, ErrTicket
	}
	return t, nil
}
