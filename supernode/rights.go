package supernode

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync/atomic"

	"github.com/gin-gonic/gin"
	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// Role is what the holder of a token may do with the HTTP API.
type Role string

// The roles. An admin may all that a reader may.
const (
	RoleRead  Role = "read"  // look at it
	RoleAdmin Role = "admin" // change something
)

// may tells whether a role is enough where another is wanted.
func (r Role) may(want Role) bool { return r == want || r == RoleAdmin }

// ParseRole returns the role of that name.
func ParseRole(s string) (Role, error) {
	if r := Role(s); r == RoleRead || r == RoleAdmin {
		return r, nil
	}
	return "", fmt.Errorf("role %.20q: want %s or %s", s, RoleRead, RoleAdmin)
}

const (
	tokenBytes = 32
	tokenStart = "dmf_" // by which those who look for lost secrets know one
	maxTokens  = 1000   // in a file: each is compared with
)

var holderForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`)

// NewToken returns a new token and the line for the file of tokens, which holds
// only its hash.
func NewToken(name string, role Role) (token, line string, err error) {
	if !holderForm.MatchString(name) {
		return "", "", fmt.Errorf("name %.64q: want up to 64 letters, digits and . _ @ -", name)
	}
	if role, err = ParseRole(string(role)); err != nil {
		return "", "", err
	}
	b := make([]byte, tokenBytes)
	if _, err := rand.Read(b); err != nil {
		return "", "", err
	}
	token = tokenStart + base64.RawURLEncoding.EncodeToString(b)
	sum := sha256.Sum256([]byte(token))
	return token, fmt.Sprintf("%s %s %x", name, role, sum), nil
}

// holder is a line of the file of tokens.
type holder struct {
	name string
	role Role
	hash [sha256.Size]byte
}

// parseTokens reads lines "NAME ROLE HASH"; empty ones and those that begin with
// # say nothing. Its errors quote none of it.
func parseTokens(b []byte) ([]holder, error) {
	var all []holder
	n := 0
	for line := range bytes.Lines(b) {
		n++
		f := strings.Fields(string(line))
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		h, ok := parseHolder(f)
		if !ok {
			return nil, fmt.Errorf("line %d: want NAME, read or admin, and a hash, as supernode token prints it", n)
		}
		if all = append(all, h); len(all) > maxTokens {
			return nil, fmt.Errorf("line %d: want at most %d tokens", n, maxTokens)
		}
	}
	return all, nil
}

func parseHolder(f []string) (h holder, ok bool) {
	if len(f) != 3 || !holderForm.MatchString(f[0]) || len(f[2]) != 2*sha256.Size {
		return h, false
	}
	role, err := ParseRole(f[1])
	if err != nil {
		return h, false
	}
	h.name, h.role = f[0], role
	_, err = hex.Decode(h.hash[:], []byte(f[2]))
	return h, err == nil
}

// rights says who may use the HTTP API. Without a file of tokens that is who asks
// from this machine, for looking.
type rights struct {
	file *registryproxy.File[[]holder] // nil for none
	log  *zap.Logger
	said atomic.Value // string: why the file could not be read when that was last tried
}

// changed returns why the file cannot be read, "" where that has been said.
func (g *rights) changed(err error) string {
	why := ""
	if err != nil {
		why = err.Error()
	}
	if g.said.Swap(why) == why {
		return ""
	}
	return why
}

func openRights(path string, log *zap.Logger) (*rights, error) {
	if path == "" {
		return &rights{log: log}, nil
	}
	file, err := registryproxy.OpenFile(path, parseTokens)
	if err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	return &rights{file: file, log: log}, nil
}

// holder returns whose token it is. Each line is compared with, in the same time.
func (g *rights) holder(token string) (holder, bool) {
	all, err := g.file.Get()
	if why := g.changed(err); why != "" {
		g.log.Error("tokens cannot be read: those of before count, if there are any", zap.String("error", why))
	}
	sum := sha256.Sum256([]byte(token))
	var found holder
	ok := 0
	for _, h := range all {
		if subtle.ConstantTimeCompare(h.hash[:], sum[:]) == 1 {
			found, ok = h, 1
		}
	}
	return found, ok == 1
}

// want lets pass who has a role.
func (g *rights) want(role Role) gin.HandlerFunc {
	return func(c *gin.Context) {
		status, code, why := g.check(c.Request, role)
		if status == 0 {
			return
		}
		if status == http.StatusUnauthorized {
			c.Header("WWW-Authenticate", `Bearer realm="damselfly"`)
		}
		writeError(c.Writer, status, code, why)
		c.Abort()
	}
}

// check returns why a request may not have what takes a role; 0 when it may.
func (g *rights) check(r *http.Request, role Role) (status int, code, why string) {
	if g.file == nil {
		if role == RoleRead && api.OfThisHost(r) && api.NamesThisHost(r) {
			return 0, "", ""
		}
		return http.StatusForbidden, api.CodeForbidden,
			"without --tokens the API is for programs of the supernode's own machine, and for looking: make a token with supernode token"
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") || len(token) > 256 {
		return http.StatusUnauthorized, api.CodeUnauthorized, "want a token, as Authorization: Bearer TOKEN"
	}
	h, ok := g.holder(strings.TrimSpace(token))
	switch {
	case !ok:
		g.log.Info("unknown token at the API", zap.String("remote", r.RemoteAddr))
		return http.StatusUnauthorized, api.CodeUnauthorized, "the token is not one of this supernode"
	case !h.role.may(role):
		return http.StatusForbidden, api.CodeForbidden, fmt.Sprintf("the token of %s has the role %s, this takes %s", h.name, h.role, role)
	}
	if role == RoleAdmin {
		g.log.Info("request by an admin", zap.String("name", h.name), zap.String("method", r.Method), zap.String("path", r.URL.Path))
	}
	return 0, "", ""
}

var errUnfinished = errors.New("the content is on its way: ask again when it has come")

// forget drops a content from the supernode and all hosts.
func (o *origin) forget(id string) (status int, code string, err error) {
	task, err := pieces.ParseTaskID(id)
	if err != nil {
		return http.StatusBadRequest, api.CodeBadRequest, err
	}
	if o.find(task) != nil {
		return http.StatusConflict, api.CodeConflict, errUnfinished
	}
	c, err := o.store.Get(task)
	if err != nil {
		return http.StatusNotFound, api.CodeNotFound, errors.New("there is no such task here")
	}
	c.Release()
	o.drop(task, "an admin has removed it", always)
	return http.StatusNoContent, "", nil
}
