package registryproxy

import (
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// later answers as h after d, if it is still wanted, and notes who is not.
func later(d time.Duration, h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(d):
			h(w, r)
		case <-r.Context().Done():
		}
	}
}

// A dead connection costs no more than hurry, a registry that takes its time one
// request more.
func TestHedge(t *testing.T) {
	good := sourceOf("0123456789")
	for name, tt := range map[string]struct {
		answers  []http.HandlerFunc
		asked    int
		takes    time.Duration
		refusal  int
		err      string
		canceled int
	}{
		"at once":              {answers: []http.HandlerFunc{good}, asked: 1},
		"in time":              {answers: []http.HandlerFunc{later(3*time.Second, good)}, asked: 1, takes: 3 * time.Second},
		"the first is dead":    {answers: []http.HandlerFunc{stall, good}, asked: 2, takes: hurry, canceled: 1},
		"both are slow":        {answers: []http.HandlerFunc{later(7*time.Second, good), later(7*time.Second, good)}, asked: 2, takes: 7 * time.Second, canceled: 1},
		"the first says no":    {answers: []http.HandlerFunc{later(7*time.Second, http.NotFound), stall}, asked: 2, takes: 7 * time.Second, refusal: 404, canceled: 1},
		"the second says no":   {answers: []http.HandlerFunc{stall, http.NotFound}, asked: 2, takes: hurry, refusal: 404, canceled: 1},
		"the first breaks off": {answers: []http.HandlerFunc{later(5*time.Second, reset), later(2*time.Second, good)}, asked: 2, takes: hurry + 2*time.Second},
		"both are dead":        {answers: []http.HandlerFunc{stall, stall}, asked: 2, takes: headerTimeout, err: "no answer in time", canceled: 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, c := newBusy(t, tt.answers...)
				body, err := c.Blob(t.Context(), public, digestOf("0123456789"), 0, Caller{})
				require.Equal(t, tt.takes, time.Since(b.start))
				require.Len(t, b.times(), tt.asked)
				switch {
				case tt.refusal != 0:
					require.Equal(t, tt.refusal, refusalOf(t, err).Status)
				case tt.err != "":
					require.ErrorContains(t, err, tt.err)
				default:
					require.NoError(t, err)
					<-time.After(time.Minute) // what is given up takes nothing with it
					got, err := io.ReadAll(body)
					require.NoError(t, err)
					require.Equal(t, "0123456789", string(got))
					require.NoError(t, body.Close())
				}
				synctest.Wait()
				require.Equal(t, tt.canceled, c.count("blob", resultCanceled))
			})
		})
	}
}

// A manifest whose body goes wrong is asked for again.
func TestManifestComesAgain(t *testing.T) {
	const whole = `{"schemaVersion":2}`
	half := func(h http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "19")
			_, _ = io.WriteString(w, whole[:9])
			w.(http.Flusher).Flush()
			h(w, r)
		}
	}
	for name, tt := range map[string]struct {
		first http.HandlerFunc
		takes time.Duration
	}{
		"truncation":   {half(func(http.ResponseWriter, *http.Request) {}), 0},
		"stall":        {half(stall), hurry},
		"drip":         {half(drip), hurry},
		"other bytes":  {answers(200, http.Header{"Docker-Content-Digest": {digestOf(whole)}}, `{"schemaVersion":3}`), 0},
		"other digest": {answers(200, http.Header{"Docker-Content-Digest": {digestOf("")}}, whole), 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, c := newBusy(t, tt.first, sourceOf(whole))
				m, err := c.Manifest(t.Context(), false, public, digestOf(whole), nil, Caller{})
				require.NoError(t, err)
				require.Equal(t, whole, string(m.Body))
				require.Equal(t, tt.takes, time.Since(b.start))
			})
		})
	}
}
