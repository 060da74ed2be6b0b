package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// TokenFile is where an authority keeps its join tokens, as hashes.
	TokenFile = "tokens.json"

	tokenPrefix = "dfly1"
	secretSize  = 32 // random bytes: no guessing, so a plain hash keeps them
	idSize      = 6
	maxToken    = 256 // bytes
)

var errToken = errors.New("not a join token: want what `supernode ca` printed")

// Token lets hosts get certificates. Its text is a secret.
type Token struct {
	ID     string
	secret []byte
	root   [sha256.Size]byte // of the authority's public key, which tells the supernode from others
}

// String says nothing of the secret.
func (t Token) String() string { return "join token " + t.ID }

// Text returns the token as it is handed to hosts.
func (t Token) Text() string {
	enc := base64.RawURLEncoding
	return strings.Join([]string{tokenPrefix, t.ID, enc.EncodeToString(t.secret), enc.EncodeToString(t.root[:])}, ".")
}

// ParseToken reads the text of a token.
func ParseToken(text string) (Token, error) {
	parts := strings.Split(strings.TrimSpace(text), ".")
	if len(text) > maxToken || len(parts) != 4 || parts[0] != tokenPrefix {
		return Token{}, errToken
	}
	enc := base64.RawURLEncoding.Strict()
	t := Token{ID: parts[1]}
	id, err0 := hex.DecodeString(t.ID)
	secret, err1 := enc.DecodeString(parts[2])
	root, err2 := enc.DecodeString(parts[3])
	if errors.Join(err0, err1, err2) != nil || len(id) != idSize || len(secret) != secretSize || copy(t.root[:], root) != len(t.root) || len(root) != len(t.root) {
		return Token{}, errToken
	}
	t.secret = secret
	return t, nil
}

// TokenInfo is what an authority knows of a token.
type TokenInfo struct {
	ID      string    `json:"id"`
	Hash    string    `json:"sha256"` // of the secret, in hex
	Made    time.Time `json:"made"`
	Expires time.Time `json:"expires,omitzero"` // hosts may come until then, and renew after; zero is always
}

// ReadTokens returns the tokens of the authority in dir.
func ReadTokens(dir string) ([]TokenInfo, error) {
	b, err := readFile(filepath.Join(dir, TokenFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("join tokens: %w", err)
	}
	var tokens []TokenInfo
	if err := json.Unmarshal(b, &tokens); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, TokenFile), err)
	}
	return tokens, nil
}

// AddToken makes a token that is good for a time, 0 for always.
func (c *CA) AddToken(life time.Duration) (Token, error) {
	tokens, err := ReadTokens(c.dir)
	if err != nil {
		return Token{}, err
	}
	random := make([]byte, idSize+secretSize)
	_, _ = rand.Read(random) // it never fails
	t := Token{ID: hex.EncodeToString(random[:idSize]), secret: random[idSize:], root: sha256.Sum256(c.cert.RawSubjectPublicKeyInfo)}
	info := TokenInfo{ID: t.ID, Hash: hashOf(t.secret), Made: time.Now().UTC().Truncate(time.Second)}
	if life > 0 {
		info.Expires = info.Made.Add(life)
	}
	return t, c.writeTokens(append(tokens, info))
}

// Revoke takes a token back: no host comes with it any more, and those that have
// are not renewed.
func (c *CA) Revoke(id string) error {
	tokens, err := ReadTokens(c.dir)
	if err != nil {
		return err
	}
	left := slices.DeleteFunc(slices.Clone(tokens), func(t TokenInfo) bool { return t.ID == id })
	if len(left) == len(tokens) {
		return fmt.Errorf("there is no join token %.20q: --list shows them", id)
	}
	return c.writeTokens(left)
}

func (c *CA) writeTokens(tokens []TokenInfo) error {
	b, err := json.MarshalIndent(tokens, "", "  ")
	if err == nil {
		err = replace(filepath.Join(c.dir, TokenFile), append(b, '\n'), os.FileMode(0o600))
	}
	if err != nil {
		return fmt.Errorf("keep the join tokens: %w", err)
	}
	return nil
}

func hashOf(secret []byte) string {
	sum := sha256.Sum256(secret)
	return hex.EncodeToString(sum[:])
}

// check returns the id of the token whose text, ID.SECRET, a host has sent.
func check(tokens []TokenInfo, text string, now time.Time) (string, error) {
	id, secret, _ := strings.Cut(text, ".")
	raw, err := base64.RawURLEncoding.DecodeString(secret)
	i := slices.IndexFunc(tokens, func(t TokenInfo) bool { return t.ID == id })
	if err != nil || i < 0 || subtle.ConstantTimeCompare([]byte(hashOf(raw)), []byte(tokens[i].Hash)) != 1 {
		return "", &Refused{"the join token is unknown or revoked: make one with `supernode ca`"}
	}
	if t := tokens[i]; !t.Expires.IsZero() && now.After(t.Expires) {
		return "", &Refused{fmt.Sprintf("the join token has expired at %s: make one with `supernode ca`", t.Expires.Format(time.RFC3339))}
	}
	return id, nil
}
