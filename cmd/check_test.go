package cmd_test

import (
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"
)

// freePort is an address on which nobody listened just now.
func freePort(t *testing.T) string {
	t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	return ln.Addr().String()
}

// source is a registry that asks for a password below /v2/private/, and to which
// demo/app:v1, an index, and private/app:v1 have been pushed.
func source(t *testing.T) *httptest.Server {
	t.Helper()
	open := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		if strings.HasPrefix(r.URL.Path, "/v2/private/") && (user != "u" || password != "p") {
			w.Header().Set("WWW-Authenticate", `Basic realm="private"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		open.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	image, err := random.Image(300<<10, 2)
	require.NoError(t, err)
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{
		Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}},
	})
	host := strings.TrimPrefix(s.URL, "http://")
	ref, err := name.ParseReference(host+"/demo/app:v1", name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.WriteIndex(ref, index))
	ref, err = name.ParseReference(host+"/private/app:v1", name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.Write(ref, image, remote.WithAuth(&authn.Basic{Username: "u", Password: "p"})))
	return s
}

func TestCheck(t *testing.T) {
	s := source(t)
	at := []string{"--registry", "reg.test=" + s.URL}
	centre := start(t, "supernode", "address", centre(t.TempDir(), at...)...)
	run := func(t *testing.T, supernode string) (check func(args ...string) (int, string)) {
		t.Helper()
		metrics := freePort(t)
		d := start(t, "dfdaemon", "mirror", agent(t.TempDir(), append(at, "--supernode", supernode, "--metrics-listen", metrics)...)...)
		return func(args ...string) (int, string) {
			code, out, _ := tell(t, append([]string{"check", "--mirror", d.address, "--metrics", metrics}, args...)...)
			return code, out
		}
	}
	check := run(t, "http://"+centre.address)
	require.Eventually(t, func() bool {
		_, out := check("reg.test/demo/nothing:v1")
		return strings.Contains(out, "swarm   session")
	}, 10*time.Second, 100*time.Millisecond)

	code, out := check("reg.test/demo/app:v1")
	require.Zero(t, code, out)
	for _, step := range []string{"dfdaemon", "session", "resolve", "manifest", "platform", "manifest of the platform", "configuration", "smallest layer"} {
		require.Contains(t, out, "swarm   "+step+": ")
	}
	require.Contains(t, out, "bytes from the supernode")

	code, out = check("--json", "reg.test/demo/app:v1")
	require.Zero(t, code, out)
	var report struct {
		Image, Outcome string
		Steps          []struct {
			Name, Outcome string
			Sources       map[string]int64
		}
	}
	require.NoError(t, json.Unmarshal([]byte(out), &report))
	require.Equal(t, "swarm", report.Outcome)
	require.Equal(t, "reg.test/demo/app:v1", report.Image)
	last := report.Steps[len(report.Steps)-1]
	require.Positive(t, last.Sources["store"], out) // by the second check all of it is there

	code, out = check("reg.test/demo/nothing:v1")
	require.Equal(t, 4, code, out)
	require.Contains(t, out, "refused resolve: 404")
	code, out = check("--platform", "plan9/mips", "reg.test/demo/app:v1")
	require.Equal(t, 4, code, out)
	require.Contains(t, out, "it is for linux/"+runtime.GOARCH)
	code, out = check("reg.test/private/app:v1")
	require.Equal(t, 4, code, out)
	require.Contains(t, out, "--username")

	alone := run(t, "http://127.0.0.1:1")
	code, out = alone("reg.test/demo/app:v1")
	require.Equal(t, 3, code, out)
	require.Contains(t, out, "past    session: no session with a supernode")
	require.Contains(t, out, "bytes from the registry")
	require.Contains(t, out, "(no_session)")
	s.Close()
	code, out = alone("reg.test/demo/app:v2")
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "neither the region nor the registry answers")

	code, out, says := tell(t, "check", "--mirror", freePort(t), "reg.test/demo/app:v1")
	require.Equal(t, 1, code)
	require.Contains(t, out, "failed  dfdaemon: nothing answers")
	require.Contains(t, says, "an engine turns to the registry")
	for _, args := range [][]string{{"check"}, {"check", "A B"}, {"check", "--platform", "linux", "a"}, {"check", "--username", "u", "a"}} {
		code, _, says = tell(t, args...)
		require.Equal(t, 2, code, says)
	}
}

// A private image comes with the credentials that the engine would have.
func TestCheckOfAPrivateImage(t *testing.T) {
	s := source(t)
	metrics := freePort(t)
	d := start(t, "dfdaemon", "mirror", agent(t.TempDir(), "--registry", "reg.test="+s.URL, "--metrics-listen", metrics)...)
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dfdaemon"), "check", "--mirror", d.address, "--metrics", metrics,
		"--username", "u", "--password-stdin", "reg.test/private/app:v1")
	cmd.Stdin = strings.NewReader("p\n")
	out, err := cmd.CombinedOutput()
	require.ErrorContains(t, err, "exit status 3", string(out)) // it works, alone as the host is
	require.Contains(t, string(out), "past    smallest layer")
}
