package supernode

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	keyName     = "ticket.key"
	rotateEvery = time.Hour // longer than any ticket's life
)

// The keys that a supernode has at a time. The hosts know a key when it is the
// next one, so that nobody gets a ticket that others do not know.
const (
	lastKey = iota
	presentKey
	nextKey
	someKeys
)

// ticketKeys sign tickets.
type ticketKeys struct {
	root *os.Root
	log  *zap.Logger

	mu   sync.RWMutex // guards what follows
	keys [someKeys]ed25519.PrivateKey
}

// loadKeys reads the keys, or makes some.
func loadKeys(root *os.Root, log *zap.Logger) (*ticketKeys, error) {
	k := &ticketKeys{root: root, log: log}
	b, err := readSmall(root, keyName, someKeys*ed25519.SeedSize)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the keys of tickets: %w", err)
	}
	if err == nil && len(b) != someKeys*ed25519.SeedSize {
		log.Warn("keys of tickets replaced: they are damaged or of an earlier version", zap.String("file", keyName))
	}
	if len(b) == someKeys*ed25519.SeedSize {
		for i := range k.keys {
			k.keys[i] = ed25519.NewKeyFromSeed(b[i*ed25519.SeedSize:][:ed25519.SeedSize])
		}
		info, err := root.Stat(keyName)
		if err != nil || time.Since(info.ModTime()) < rotateEvery {
			return k, err
		}
		return k, k.rotate(1)
	}
	return k, k.rotate(someKeys)
}

// rotate puts n new keys after those there are, and forgets as many.
func (k *ticketKeys) rotate(n int) error {
	k.mu.RLock()
	next := k.keys
	k.mu.RUnlock()
	var seeds []byte
	for range n {
		_, fresh, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return fmt.Errorf("make a key of tickets: %w", err)
		}
		copy(next[:], next[1:])
		next[nextKey] = fresh
	}
	for _, key := range next {
		seeds = append(seeds, key.Seed()...)
	}
	if err := writeSmall(k.root, keyName, seeds, true); err != nil {
		return fmt.Errorf("keep the keys of tickets: %w", err)
	}
	k.mu.Lock()
	k.keys = next
	k.mu.Unlock()
	return nil
}

// run rotates the keys until ctx ends, and has told called after each time.
func (k *ticketKeys) run(ctx context.Context, told func()) {
	t := time.NewTicker(rotateEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if err := k.rotate(1); err != nil {
			k.log.Error("the keys of tickets stay", zap.Error(err))
			continue
		}
		told()
	}
}

// public returns the keys that tickets are verified with.
func (k *ticketKeys) public() (all []ed25519.PublicKey) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	for _, key := range k.keys {
		all = append(all, key.Public().(ed25519.PublicKey))
	}
	return all
}

// wire is public as it goes to hosts.
func (k *ticketKeys) wire() (all [][]byte) {
	for _, key := range k.public() {
		all = append(all, key)
	}
	return all
}

func (k *ticketKeys) sign(t api.Ticket) (string, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return api.SignTicket(k.keys[presentKey], t)
}

func (k *ticketKeys) verify(signed string, id pieces.TaskID, now time.Time) (api.Ticket, error) {
	return api.VerifyTicket(k.public(), signed, id, now)
}

// tellKeys tells all hosts the keys of tickets anew.
func (r *region) tellKeys(keys [][]byte) {
	for _, s := range r.hosts {
		s.send(message{size: 128, add: func(b *api.Down) { b.Keys = keys }})
	}
}
