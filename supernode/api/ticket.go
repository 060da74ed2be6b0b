package api

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"

	"damselfly.dev/pieces"
)

const (
	// TicketLife is how long a ticket is good for of what anyone may read; a host with
	// a running task gets a new one at half of it.
	TicketLife = 10 * time.Minute
	// TicketGrace is how long a ticket of another task outlives the right to read it:
	// for as long as the origin is asked again.
	TicketGrace = 10 * time.Second
	// TicketRest is how long an answer that has begun may go on past the ticket's end.
	TicketRest = 30 * time.Second
)

// Ticket is a supernode's word that a host may read a task. Who serves pieces
// asks for it on every request; it holds no credential of anybody.
type Ticket struct {
	Task    string `cbor:"1,keyasint"`
	Host    string `cbor:"2,keyasint"` // as its certificate says; without TLS as it says itself
	Expires int64  `cbor:"3,keyasint"` // Unix seconds
	Public  bool   `cbor:"4,keyasint,omitempty"`
}

// Errors of tickets.
var (
	// ErrTicket is returned for a ticket that is missing, malformed, forged,
	// expired, for another task, or another host's.
	ErrTicket = errors.New("no valid ticket for this task")
	// ErrClear is returned where what not everybody may read would go over a
	// connection that others may listen to.
	ErrClear = errors.New("what is private is not sent in clear: turn TLS on, see docs/security.md")
)

// Permits tells whether t lets in who has come: host is the name in its
// certificate, "" without TLS, and sealed tells that nobody can listen.
func (t Ticket) Permits(host string, sealed bool) error {
	switch {
	case host != "" && t.Host != host:
		return ErrTicket
	case !sealed && !t.Public:
		return ErrClear
	}
	return nil
}

// Rest is how long an answer may take that t lets begin now.
func (t Ticket) Rest(now time.Time) time.Duration {
	return min(time.Unix(t.Expires, 0).Sub(now), TicketLife) + TicketRest
}

// SignTicket returns t in its signed form, safe in a header.
func SignTicket(key ed25519.PrivateKey, t Ticket) (string, error) {
	body, err := cbor.Marshal(t)
	if err != nil {
		return "", fmt.Errorf("sign ticket: %w", err)
	}
	enc := base64.RawURLEncoding
	return enc.EncodeToString(body) + "." + enc.EncodeToString(ed25519.Sign(key, body)), nil
}

// VerifyTicket checks a signed ticket for task, of any of the keys; any failure
// is ErrTicket.
func VerifyTicket(keys []ed25519.PublicKey, signed string, task pieces.TaskID, now time.Time) (Ticket, error) {
	var t Ticket
	b, s, ok := strings.Cut(signed, ".")
	if !ok || len(signed) > 1024 {
		return t, ErrTicket
	}
	enc := base64.RawURLEncoding
	body, err1 := enc.DecodeString(b)
	sig, err2 := enc.DecodeString(s)
	signs := func(k ed25519.PublicKey) bool {
		return len(k) == ed25519.PublicKeySize && ed25519.Verify(k, body, sig)
	}
	if err1 != nil || err2 != nil || !slices.ContainsFunc(keys, signs) {
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
