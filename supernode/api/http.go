package api

import (
	"errors"
	"net/url"

	"damselfly.dev/pieces"
)

// Paths of the HTTP API. ContentPath is served by the supernode and by every
// peer: GET with Range gives the bytes of pieces that it has.
const (
	SessionPath = "/v1/session"
	TasksPath   = "/v1/tasks"
)

// ContentPath is where the content of a task is read.
func ContentPath(id pieces.TaskID) string { return TasksPath + "/" + string(id) + "/content" }

// Headers of the HTTP API.
const (
	// TicketHeader carries a ticket on a request for content.
	TicketHeader = "Damselfly-Ticket"
	// HeldHeader says in the answer of a parent how many milliseconds it waited for a
	// piece that was on its way to it.
	HeldHeader = "Damselfly-Held-Ms"
	// RetryHeader says in a 503 from a parent that is busy when to come back,
	// in milliseconds.
	RetryHeader = "Damselfly-Retry-Ms"
	// ErrorHeader marks an answer in which Damselfly and not the registry says
	// no; its value is the code of the Error. A client that sees it asks the
	// registry itself.
	ErrorHeader = "Damselfly-Error"
	// StaleHeader marks a manifest that could not be checked with the registry;
	// its value is the age of the last check in seconds. By digest, where only
	// the caller's right to read could not be checked, it is 0.
	StaleHeader = "Damselfly-Stale"
)

// Error is the form of every error of the HTTP API below /v1/. Code is stable
// and for programs, Message is for people and says what to do.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// Codes of Error.
const (
	CodeBadRequest   = "bad_request"    // 400
	CodeUnauthorized = "unauthorized"   // 401: no ticket or token, or not a valid one
	CodeForbidden    = "forbidden"      // 403: the token's role is not enough
	CodeNotFound     = "not_found"      // 404
	CodeConflict     = "conflict"       // 409: not now
	CodeRange        = "range"          // 416
	CodeUnavailable  = "unavailable"    // 502, 503: the origin or the region cannot answer now
	CodeBusy         = "busy"           // 503: come back after RetryHeader
	CodeClear        = "clear"          // 502: it is private, and the connection is not encrypted
	CodeNotAllowed   = "not_allowed"    // 405
	CodeTooManyHosts = "too_many_hosts" // 503
)

// WithoutURL is an error of net/http's without the URL, which may hold a secret.
func WithoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}
