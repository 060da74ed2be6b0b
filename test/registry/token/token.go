// Package token is a small token server for tests: it signs what
// docker/distribution's token authentication verifies.
package token

import (
	"cmp"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/docker/distribution/registry/auth/token"
)

// Life is how long a token is good for where the server does not say.
const Life = 5 * time.Minute

// Server gives users tokens for all they ask for, and anyone one to pull from
// repositories below "public/". Who names a wrong password gets none.
type Server struct {
	Issuer, Service string
	Users           map[string]string // passwords
	Below           map[string]string // users whose tokens are for repositories that begin so alone
	Key             *rsa.PrivateKey
	Chain           [][]byte      // certificates of the key in DER, its own first
	Life            time.Duration // of a token; 0 stands for Life

	issued atomic.Int64
}

// Issued tells how many tokens have been given out.
func (s *Server) Issued() int64 { return s.issued.Load() }

// ServeHTTP answers a request for a token.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, password, given := r.BasicAuth()
	if given && (s.Users[user] == "" || s.Users[user] != password) {
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}`, http.StatusUnauthorized)
		return
	}
	q := r.URL.Query()
	if q.Get("service") != s.Service {
		http.Error(w, "no such service", http.StatusBadRequest)
		return
	}
	access := []*token.ResourceActions{}
	for _, scope := range q["scope"] {
		kind, rest, _ := strings.Cut(scope, ":")
		name, actions, _ := strings.Cut(rest, ":")
		wanted := strings.Split(actions, ",")
		if !given {
			wanted = slices.DeleteFunc(wanted, func(a string) bool { return a != "pull" || !strings.HasPrefix(name, "public/") })
		} else if !strings.HasPrefix(name, s.Below[user]) {
			wanted = nil
		}
		access = append(access, &token.ResourceActions{Type: kind, Name: name, Actions: wanted})
	}
	t, err := s.sign(user, access)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.issued.Add(1)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": t, "expires_in": s.life().Seconds()})
}

func (s *Server) life() time.Duration { return cmp.Or(s.Life, Life) }

// sign makes a JSON Web Token.
func (s *Server) sign(user string, access []*token.ResourceActions) (string, error) {
	chain := make([]string, len(s.Chain))
	for i, der := range s.Chain {
		chain[i] = base64.StdEncoding.EncodeToString(der)
	}
	now := time.Now()
	header, err := json.Marshal(map[string]any{"typ": "JWT", "alg": "RS256", "x5c": chain})
	if err != nil {
		return "", err
	}
	claims, err := json.Marshal(token.ClaimSet{
		Issuer: s.Issuer, Subject: user, Audience: s.Service, JWTID: fmt.Sprint(now.UnixNano()),
		IssuedAt: now.Unix(), NotBefore: now.Unix() - 5, Expiration: now.Add(s.life()).Unix(), Access: access,
	})
	if err != nil {
		return "", err
	}
	text := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(claims)
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, s.Key, crypto.SHA256, sum[:])
	if err != nil {
		return "", fmt.Errorf("sign a token: %w", err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}
