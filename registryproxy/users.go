package registryproxy

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/crypto/bcrypt"
)

// Users are those of a file of lines NAME:HASH with bcrypt's hashes, as
// "htpasswd -nB NAME" writes them. It is read again when it changes.
type Users struct {
	file *File[map[string][]byte]

	mu    sync.Mutex // one password is hashed at a time; guards known
	known map[string]knownUser
}

// knownUser is one whose password was right.
type knownUser struct {
	hash     string // in the file
	password [sha256.Size]byte
}

// LoadUsers reads a file of users.
func LoadUsers(path string) (*Users, error) {
	file, err := OpenFile(path, parseUsers)
	if err != nil {
		return nil, err
	}
	return &Users{file: file, known: map[string]knownUser{}}, nil
}

func parseUsers(b []byte) (map[string][]byte, error) {
	users := map[string][]byte{}
	n := 0
	for line := range bytes.Lines(b) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		name, hash, ok := bytes.Cut(line, []byte(":"))
		if _, err := bcrypt.Cost(hash); !ok || err != nil || len(name) == 0 {
			return nil, fmt.Errorf("line %d: want NAME:HASH with a hash of bcrypt, as htpasswd -nB writes it", n)
		}
		users[string(name)] = bytes.Clone(hash)
	}
	if len(users) == 0 {
		return nil, errors.New("it names no user")
	}
	return users, nil
}

// Allow tells whether a name and a password are those of a user.
func (u *Users) Allow(name, password string) bool {
	users, _ := u.file.Get() // where it cannot be read, those of before
	hash, ok := users[name]
	if !ok || len(password) > 72 { // what bcrypt looks at
		return false
	}
	sum := sha256.Sum256([]byte(name + ":" + password))
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.known[name] == (knownUser{string(hash), sum}) {
		return true
	}
	if bcrypt.CompareHashAndPassword(hash, []byte(password)) != nil {
		return false
	}
	u.known[name] = knownUser{string(hash), sum} // as many as there are users, and were
	return true
}
