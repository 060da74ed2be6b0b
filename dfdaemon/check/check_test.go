package check

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// fake is a mirror with one image, and dfdaemon's metrics.
type fake struct {
	layer  string // what it sends of it
	token  string // that it wants, "" for none
	length string // of the answer to the first HEAD, "" for the right one
	origin int    // bytes from the registry, by its metrics
}

func (f *fake) serve(t *testing.T) (addr string, image Image) {
	t.Helper()
	const layer, config = "the layer", "{}"
	manifest := fmt.Sprintf(`{"config": {"digest": %q, "size": 2}, "layers": [{"digest": %q, "size": 9}, {"digest": %q, "size": 70}]}`,
		digest.FromString(config), digest.FromString(layer), digest.FromString("another"))
	contents := map[string]string{
		"manifests/v1": manifest, "manifests/" + digest.FromString(manifest).String(): manifest,
		"blobs/" + digest.FromString(config).String(): config, "blobs/" + digest.FromString(layer).String(): f.layer,
	}
	var s *httptest.Server
	s = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v2/":
		case r.URL.Path == "/token":
			user, password, _ := r.BasicAuth()
			if user != "u" || password != "hush" || r.URL.Query().Get("scope") != "repository:org/app:pull" {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			_ = json.NewEncoder(w).Encode(map[string]string{"token": f.token})
		case r.URL.Path == "/metrics":
			_, _ = fmt.Fprintf(w, "# TYPE damselfly_session_up gauge\ndamselfly_session_up 1\n# TYPE damselfly_received_bytes_total counter\ndamselfly_received_bytes_total{source=\"origin\"} %d\n", f.origin)
		case r.URL.Query().Get("ns") != "reg.test":
			w.WriteHeader(http.StatusBadRequest)
		case f.token != "" && r.Header.Get("Authorization") != "Bearer "+f.token:
			w.Header().Set("WWW-Authenticate", `Negotiate, Bearer realm="`+s.URL+`/token",service="x",scope="repository:org/app:pull"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			body := contents[strings.TrimPrefix(r.URL.Path, "/v2/org/app/")]
			w.Header().Set("Docker-Content-Digest", digest.FromString(body).String())
			if f.length == "none" && r.Method == http.MethodHead {
				w.Header().Set("Transfer-Encoding", "chunked")
			} else {
				w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			}
			if strings.Contains(r.URL.Path, "/blobs/") && f.origin > 0 {
				f.origin += len(body)
			}
			_, _ = w.Write([]byte(body))
		}
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), Image{Registry: "reg.test", Name: "org/app", Reference: "v1"}
}

func TestOutcomes(t *testing.T) {
	for name, c := range map[string]struct {
		fake    fake
		cfg     Config
		outcome Outcome
		says    string // of the last step
	}{
		"well":           {fake{layer: "the layer"}, Config{}, Swarm, "9 bytes"},
		"wrong bytes":    {fake{layer: "the liar."}, Config{}, Failed, "not those of the digest"},
		"cut short":      {fake{layer: "the la"}, Config{}, Failed, "not those of the digest"},
		"too long":       {fake{layer: "the layer and more"}, Config{}, Failed, "not those of the digest"},
		"no length":      {fake{layer: "the layer", length: "none"}, Config{}, Failed, "no length"},
		"from origin":    {fake{layer: "the layer", origin: 1}, Config{}, Past, "9 bytes"},
		"no credentials": {fake{layer: "the layer", token: "t"}, Config{}, Refused, "401"},
		"wrong ones":     {fake{layer: "the layer", token: "t"}, Config{Username: "u", Password: "x"}, Refused, "wants credentials"},
		"right ones":     {fake{layer: "the layer", token: "t"}, Config{Username: "u", Password: "hush"}, Swarm, "9 bytes"},
		"no metrics":     {fake{layer: "the layer"}, Config{Metrics: "none"}, Past, "9 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			addr, image := c.fake.serve(t)
			c.cfg.Mirror, c.cfg.Platform = addr, "linux/amd64"
			if c.cfg.Metrics == "" {
				c.cfg.Metrics = addr
			} else {
				c.cfg.Metrics = ""
			}
			steps := 0
			report := Run(t.Context(), c.cfg, image, func(Step) { steps++ })
			require.Equal(t, c.outcome, report.Outcome, report)
			require.Len(t, report.Steps, steps)
			require.Contains(t, report.Steps[steps-1].Says, c.says)
			if c.outcome != Swarm {
				require.NotEmpty(t, report.Steps[steps-1].Why)
			}
			b, err := json.Marshal(report)
			require.NoError(t, err)
			require.NotContains(t, string(b), "hush")
		})
	}
}
