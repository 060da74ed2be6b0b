package check

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"damselfly.dev/registryproxy"
)

// login makes the header that the registry asks for, as an engine does: at the
// realm that the challenge names.
func (c *check) login(ctx context.Context, resp *http.Response) (string, error) {
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password))
	for _, ch := range registryproxy.Challenges(resp.Header) {
		switch ch.Scheme {
		case "basic":
			return basic, nil
		case "bearer":
			token, err := c.token(ctx, ch.Parameters, basic)
			return "Bearer " + token, err
		}
	}
	return "", errors.New("its challenge is neither Basic nor Bearer")
}

func (c *check) token(ctx context.Context, challenge map[string]string, basic string) (string, error) {
	realm, err := url.Parse(challenge["realm"])
	if err != nil || realm.Host == "" {
		return "", errors.New("its challenge names no realm")
	}
	scope := challenge["scope"]
	if scope == "" {
		scope = "repository:" + c.image.Name + ":pull"
	}
	q := realm.Query()
	q.Set("service", challenge["service"])
	q.Set("scope", scope)
	realm.RawQuery = q.Encode()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), http.NoBody)
	if err != nil {
		return "", err
	}
	r.Header.Set("Authorization", basic)
	resp, err := c.send(r)
	if err != nil {
		return "", fmt.Errorf("%s, where tokens are, does not answer: %w", realm.Host, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s, where tokens are, answers %s", realm.Host, resp.Status)
	}
	var body struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&body); err != nil {
		return "", fmt.Errorf("%s gives no token: %w", realm.Host, err)
	}
	if body.Token == "" {
		body.Token = body.AccessToken
	}
	if body.Token == "" {
		return "", fmt.Errorf("%s gives no token", realm.Host)
	}
	return body.Token, nil
}
