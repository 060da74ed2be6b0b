package registryproxy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

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
	basicLife     = 5 * time.Minute   // how long a registry is taken to want no token
	clientID      = "damselfly"
)

// errNoWay is a registry that wants something we have not.
var errNoWay = errors.New("the challenge asks for nothing that there is")

// tokenKey is what an Authorization header is good for. A read of a repository
// always has the same scope.
type tokenKey struct {
	repo  Repository
	login [sha256.Size]byte
}

// tokens holds a host's tokens until they expire, as Authorization headers.
type tokens struct {
	known  *memo[tokenKey, string]
	flight singleflight.Group
}

func newTokens() *tokens {
	return &tokens{known: newMemo[tokenKey, string](maxTokens, time.Now)}
}

func (t *tokens) get(key tokenKey) (string, bool) { return t.known.get(key) }

// forget drops a token that was not accepted.
func (t *tokens) forget(key tokenKey, token string) {
	t.known.drop(key, func(v string) bool { return v == token })
}

// authorization returns an Authorization header for reads of repo as who, who may
// be nobody, by the challenges in header. Askers at the same moment share one
// request to the token server. (Of docker/distribution's client the challenge
// parser is used here; its token handler takes no context, locks over the request
// and reads answers of any size.)
func (c *Client) authorization(ctx context.Context, e *endpoint, repo Repository, who login, header http.Header) (string, error) {
	params, basic := wanted(header)
	if params == nil {
		if h := who.basic(); h != "" && basic {
			e.tokens.known.put(tokenKey{repo, who.hash()}, h, basicLife)
			return h, nil
		}
		return "", errNoWay
	}
	if who.bearer != "" {
		return "Bearer " + who.bearer, nil
	}
	key := tokenKey{repo, who.hash()}
	done := e.tokens.flight.DoChan(fmt.Sprint(repo, key.login), func() (any, error) {
		if token, ok := e.tokens.get(key); ok {
			return token, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tokenTimeout)
		defer cancel()
		token, life, err := c.fetchToken(ctx, e, repo, who, params)
		if err == nil {
			e.tokens.known.put(key, token, life)
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

// wanted returns the parameters of the first challenge for a bearer token, nil
// for none, and whether a user and a password will do.
func wanted(header http.Header) (bearer map[string]string, basic bool) {
	for _, ch := range Challenges(header) {
		switch {
		case bearer == nil && ch.Scheme == "bearer" && ch.Parameters["realm"] != "":
			bearer = ch.Parameters
		case ch.Scheme == "basic":
			basic = true
		}
	}
	return bearer, basic
}

// fetchToken asks the token server of a challenge. Its errors quote nothing of
// the challenge or of the answer.
func (c *Client) fetchToken(ctx context.Context, e *endpoint, repo Repository, who login, params map[string]string) (token string, life time.Duration, err error) {
	realm, err := url.Parse(params["realm"])
	if err != nil || realm.Host == "" {
		return "", 0, errors.New("the challenge's realm is not a URL")
	}
	if realm.Scheme != "https" && realm.Scheme != e.base.Scheme {
		return "", 0, errors.New("the challenge's realm is not on https")
	}
	scope := params["scope"]
	if scope == "" && repo.Name != "" {
		scope = "repository:" + repo.Name + ":pull"
	}
	r := tokenRequest(realm, params["service"], scope, who)
	key := limitKeyOf(realm.Host, tokenKind, r.method, string(fmt.Append(nil, who.hash())))
	a, spared, err := c.limits.do(ctx, key, func() (*answer, error) {
		if r.method != http.MethodGet { // a refresh token may be good for once
			return c.exchange(ctx, e, repo.Registry, tokenKind).do(r)
		}
		return hedge(ctx, e.header, func(ctx context.Context) (*answer, error) {
			again := r
			again.header = r.header.Clone()
			return c.exchange(ctx, e, repo.Registry, tokenKind).do(again)
		})
	})
	if spared {
		c.spared.WithLabelValues(sparedLimited).Inc()
	}
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

// tokenRequest asks a token server: with a GET as docker always has, or with the
// POST of OAuth 2 where there is a refresh token.
func tokenRequest(realm *url.URL, service, scope string, who login) request {
	if who.identity != "" {
		form := url.Values{
			"grant_type": {"refresh_token"}, "refresh_token": {who.identity},
			"client_id": {clientID}, "service": {service}, "scope": {scope},
		}
		header := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
		return request{method: http.MethodPost, url: realm, header: header, body: form.Encode()}
	}
	r := request{method: http.MethodGet, url: realm, header: http.Header{}}
	query := realm.Query()
	if service != "" {
		query.Set("service", service)
	}
	for s := range strings.FieldsSeq(scope) {
		query.Add("scope", s)
	}
	if h := who.basic(); h != "" {
		query.Set("account", who.user)
		r.header.Set("Authorization", h)
	}
	realm.RawQuery = query.Encode()
	return r
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
