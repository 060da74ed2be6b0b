package registryproxy

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/docker/distribution/registry/client/auth/challenge"
	"golang.org/x/sync/singleflight"
)

const (
	tokenKind     = "token"
	maxTokens     = 4096
	maxToken      = 64 << 10          // bytes of a token server's answer
	minTokenLife  = 60 * time.Second  // what the protocol says a token lasts that does not say
	maxTokenLife  = time.Hour         // and what we believe of one that does
	tokenHeadroom = 10 * time.Second  // for a request on its way
	tokenTimeout  = 2 * headerTimeout // for the whole fetch, redirects included
)

// errNoBearer is a registry that wants something else than a token.
var errNoBearer = errors.New("the challenge asks for no bearer token")

// tokens holds anonymous tokens until they expire, as Authorization headers.
// A read of a repository always has the same scope, so the repository is the key.
type tokens struct {
	known  *memo[Repository, string]
	flight singleflight.Group
}

func newTokens() *tokens {
	return &tokens{known: newMemo[Repository, string](maxTokens, time.Now)}
}

func (t *tokens) get(repo Repository) (string, bool) { return t.known.get(repo) }

// forget drops a token that was not accepted.
func (t *tokens) forget(repo Repository, token string) {
	t.known.drop(repo, func(v string) bool { return v == token })
}

// token returns an Authorization header for anonymous reads of repo, from the
// token server that the challenges in header name. Askers at the same moment
// share one request. (The client of docker/distribution has its challenge
// parser used here; its token handler takes no context, locks over the request
// and reads answers of any size.)
func (c *Client) token(ctx context.Context, repo Repository, header http.Header) (string, error) {
	params, err := bearerParams(header)
	if err != nil {
		return "", err
	}
	done := c.tokens.flight.DoChan(repo.String(), func() (any, error) {
		if token, ok := c.tokens.get(repo); ok {
			return token, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tokenTimeout)
		defer cancel()
		token, life, err := c.fetchToken(ctx, repo, params)
		if err == nil {
			c.tokens.known.put(repo, token, life)
		}
		return token, err
	})
	select {
	case <-ctx.Done():
		return "", context.Cause(ctx)
	case r := <-done:
		return r.Val.(string), r.Err
	}
}

func bearerParams(header http.Header) (map[string]string, error) {
	resp := &http.Response{StatusCode: http.StatusUnauthorized, Header: header}
	for _, ch := range challenge.ResponseChallenges(resp) {
		if ch.Scheme == "bearer" && ch.Parameters["realm"] != "" {
			return ch.Parameters, nil
		}
	}
	return nil, errNoBearer
}

// fetchToken asks the token server of a challenge. Its errors quote nothing of
// the challenge or of the answer.
func (c *Client) fetchToken(ctx context.Context, repo Repository, params map[string]string) (token string, life time.Duration, err error) {
	realm, err := url.Parse(params["realm"])
	if err != nil || realm.Host == "" {
		return "", 0, errors.New("the challenge's realm is not a URL")
	}
	if realm.Scheme != "https" && realm.Scheme != c.base(repo.Registry).Scheme {
		return "", 0, errors.New("the challenge's realm is not on https")
	}
	query := realm.Query()
	if service := params["service"]; service != "" {
		query.Set("service", service)
	}
	scope := params["scope"]
	if scope == "" && repo.Name != "" {
		scope = "repository:" + repo.Name + ":pull"
	}
	for s := range strings.FieldsSeq(scope) {
		query.Add("scope", s)
	}
	realm.RawQuery = query.Encode()

	a, err := c.exchange(ctx, repo.Registry, tokenKind).do(http.MethodGet, realm, http.Header{})
	if err != nil {
		return "", 0, fmt.Errorf("token server: %w", err)
	}
	defer a.close()
	body, err := a.body.small(maxToken)
	if err != nil {
		return "", 0, fmt.Errorf("token server: %w", err)
	}
	return readToken(body)
}

// readToken reads a token server's answer.
func readToken(body []byte) (authorization string, life time.Duration, err error) {
	var t struct {
		Token       string  `json:"token"`
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"` // seconds
	}
	if json.Unmarshal(body, &t) != nil {
		return "", 0, errors.New("the token server's answer cannot be read")
	}
	token := cmp.Or(t.Token, t.AccessToken)
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", 0, errors.New("the token server's answer holds no token")
	}
	life = minTokenLife
	if t.ExpiresIn > life.Seconds() {
		life = time.Duration(min(t.ExpiresIn, maxTokenLife.Seconds()) * float64(time.Second))
	}
	return "Bearer " + token, life - tokenHeadroom, nil
}
