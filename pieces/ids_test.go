package pieces

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestParseTaskID(t *testing.T) {
	hex64, hex128 := strings.Repeat("0f", 32), strings.Repeat("a9", 64)
	for _, tt := range []struct {
		in string
		ok bool
	}{
		{"sha256:" + hex64, true},
		{"sha512:" + hex128, true},
		{"url:" + hex64, true},
		{"", false},
		{"sha256:", false},
		{"sha256:totallywrong", false},
		{"sha256:" + hex64[1:], false},
		{"sha256:" + hex64 + "0", false},
		{"sha256:" + strings.ToUpper(hex64), false},
		{"sha512:" + hex64, false},
		{"sha384:" + strings.Repeat("a", 96), true},
		{"sha384:" + hex64, false},
		{"md5:" + strings.Repeat("a", 32), false},
		{"url:" + strings.ToUpper(hex64), false},
		{"url:" + hex64 + "ab", false},
		{"url:https://example.com/", false},
		{hex64, false},
		{"sha256:../" + hex64[3:], false},
		{"sha256:" + hex64 + "\n", false},
		{strings.Repeat("x", 1<<20), false},
	} {
		id, err := ParseTaskID(tt.in)
		if (err == nil) != tt.ok || (tt.ok && string(id) != tt.in) {
			t.Errorf("%.80q: %v", tt.in, err)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
}

func TestTaskIDContent(t *testing.T) {
	a, b := URLTaskID("https://example.com/a"), URLTaskID("https://example.com/b")
	if id, err := ParseTaskID(string(a)); err != nil || id != a || a == b {
		t.Errorf("ids of two URLs: %s, %s, %v", a, b, err)
	}
	if a.Content() != "" {
		t.Errorf("the id of a URL says its content is %s", a.Content())
	}
	d := digest.FromString("x")
	if got := TaskID(d).Content(); got != d {
		t.Errorf("content %s, want %s", got, d)
	}
}

// FuzzParseTaskID: what is accepted is a name that stays below its directory and
// leads back to the same task.
func FuzzParseTaskID(f *testing.F) {
	f.Add("sha256:" + strings.Repeat("0f", 32))
	f.Add("sha512:" + strings.Repeat("0f", 64))
	f.Add(string(URLTaskID("https://example.com/")))
	f.Add("sha256:../../../../etc/passwd")
	f.Fuzz(func(t *testing.T, in string) {
		id, err := ParseTaskID(in)
		if err != nil {
			return
		}
		name := taskDir(id)
		if back, ok := dirTask(name); !ok || back != id {
			t.Fatalf("%q is kept as %q and comes back as %q", id, name, back)
		}
		if name != filepath.Base(name) || len(name) > 255 || strings.HasPrefix(name, tempPrefix) {
			t.Fatalf("%q is kept as %q", id, name)
		}
		if _, err := digest.Parse(string(id.Content())); err != nil && id.Content() != "" {
			t.Fatal(err)
		}
	})
}

func TestDigests(t *testing.T) {
	h := NewHash()
	if _, err := h.Write([]byte("abc")); err != nil {
		t.Fatal(err)
	}
	// BLAKE3 of "abc", from the reference implementation.
	const want = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
	if a, b := Sum([]byte("abc")), DigestOf(h); a != b || a.String() != want {
		t.Errorf("%s, %s, want %s", a, b, want)
	}
	if (Digest{}).IsZero() == Sum(nil).IsZero() {
		t.Error("the digest of nothing is no digest")
	}
}

func FuzzParseDigests(f *testing.F) {
	d := Sum([]byte("x"))
	f.Add(AppendDigests(nil))
	f.Add(AppendDigests(nil, d, Digest{}, d))
	f.Add(make([]byte, DigestSize+1))
	f.Add(make([]byte, (MaxPieces+1)*DigestSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		ds, err := ParseDigests(b)
		if err != nil {
			if len(b)%DigestSize == 0 && len(b) <= MaxPieces*DigestSize {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(AppendDigests(nil, ds...), b) || len(ds) > MaxPieces {
			t.Fatalf("%d digests of %d bytes", len(ds), len(b))
		}
	})
}

func TestSignedURLTaskID(t *testing.T) {
	ignore := []string{"X-Amz-*", "Expires", "sig"}
	id := func(u string) TaskID { d, _ := SignedURLTaskID(u, ignore); return d }
	if a, b := id("http://h/a?k=1&X-Amz-Date=1&sig=2"), id("http://h/a?x-amz-date=3&k=1&sig=4"); a != b {
		t.Error("two signatures make two ids")
	}
	one := id("http://h/a?k=1&sig=2")
	for _, other := range []string{
		"http://h/a?k=2&sig=2", "http://h/b?k=1&sig=2", "http://h/a?k=1", "http://h/a?k=1&sig=2&expires=1", "http://h/a?k=1&signature=2", "http://h/a?sig=2",
	} {
		if id(other) == one {
			t.Errorf("%s has the id of another", other)
		}
	}
	for _, plain := range []string{"http://h/a", "http://h/a?k=1", "http://h/a?"} {
		if id(plain) != URLTaskID(plain) {
			t.Errorf("%s is not its own id", plain)
		}
	}
	full, without := SignedURLTaskID("http://h/a?k=1&X-Amz-Date=1&sig=2&SIG=3", ignore)
	if again, _ := SignedURLTaskID("http://h/a?k=1&X-Amz-Date=1&sig=2&SIG=3", without); again != full {
		t.Errorf("the names %v make another id", without)
	}
}
