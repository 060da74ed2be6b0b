//go:build linux

package programs

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestParse(t *testing.T) {
	client := netip.MustParseAddr("10.77.0.3")
	for line, want := range map[string]Request{
		`10.77.0.3 - - [21/Nov/2026:04:46:37 +0000] "GET /v2/demo/app/blobs/sha256:ab?ns=x HTTP/1.1" 206 1234 "" "containerd/1.6"`: {client, "-", "GET", "/v2/demo/app/blobs/sha256:ab", 206, 1234},
		`10.77.0.3 - alice [21/Nov/2026:04:46:37 +0000] "HEAD /v2/demo/app/manifests/v1 HTTP/1.1" 404 0 "" "x"`:                    {client, "alice", "HEAD", "/v2/demo/app/manifests/v1", 404, 0},
	} {
		if got, ok := parse(line); !ok || got != want {
			t.Errorf("%s: %+v, %v", line, got, ok)
		}
	}
	for _, line := range []string{
		"", `time="2026-11-21T04:46:36Z" level=warning msg="No HTTP secret provided"`,
		`nobody - - [21/Nov/2026:04:46:37 +0000] "GET / HTTP/1.1" 200 2 "" "x"`,
		`10.77.0.3 - - [21/Nov/2026:04:46:37 +0000] "GET / HTTP/1.1" 200 99999999999999999999 "" "x"`,
	} {
		if got, ok := parse(line); ok {
			t.Errorf("%q was taken for %+v", line, got)
		}
	}
}

func TestContent(t *testing.T) {
	for q, want := range map[Request]bool{
		{Method: "GET", Path: "/v2/demo/app/blobs/sha256:ab", Status: 200}: true,
		{Method: "GET", Path: "/v2/demo/app/blobs/sha256:ab", Status: 206}: true,
		{Method: "GET", Path: "/v2/demo/app/manifests/v1", Status: 200}:    true,
		{Method: "HEAD", Path: "/v2/demo/app/manifests/v1", Status: 200}:   false,
		{Method: "GET", Path: "/v2/demo/app/manifests/v1", Status: 404}:    false,
		{Method: "GET", Path: "/v2/", Status: 200}:                         false,
		{Method: "PUT", Path: "/v2/demo/app/manifests/v1", Status: 201}:    false,
		{Method: "POST", Path: "/v2/demo/app/blobs/uploads/", Status: 202}: false,
	} {
		if q.Content() != want {
			t.Errorf("%+v: %v", q, !want)
		}
	}
}

func TestVerify(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	sum := sha256.Sum256([]byte("content"))
	name := hex.EncodeToString(sum[:])
	want := []v1.Descriptor{{Size: 7, Digest: v1.Hash{Algorithm: "sha256", Hex: name}}}
	if Verify(dir, want) == nil {
		t.Error("a missing content is right")
	}
	write(name, "content")
	if err := Verify(dir, want); err != nil {
		t.Error(err)
	}
	for _, wrong := range []string{"contenT", "conten", "content ", ""} {
		write(name, wrong)
		if Verify(dir, want) == nil {
			t.Errorf("%q is right", wrong)
		}
	}
}
