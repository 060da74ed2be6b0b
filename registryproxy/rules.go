package registryproxy

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
)

// Action is what a forward proxy does with a request.
type Action string

// The actions. Only reads go through the swarm; what else is to goes straight to
// where it was meant for.
const (
	ActionSwarm    Action = "swarm"    // by pieces from other hosts
	ActionDirect   Action = "direct"   // where it was meant for
	ActionRedirect Action = "redirect" // to Rule.To instead, without the caller's credentials
	ActionRefuse   Action = "refuse"
)

// Rule says what becomes of the requests whose URL, without its query, Match
// finds something in, a regular expression of RE2. The tags are its keys in a file.
type Rule struct {
	Match  string `mapstructure:"match"`
	Action Action `mapstructure:"action"`
	// To is where ActionRedirect leads: scheme, host, and what goes before the path.
	To string `mapstructure:"to"`
}

// DefaultRules has the reads of registries go through the swarm.
func DefaultRules() []Rule {
	return []Rule{{Match: `^https?://[^/]+/v2/.+/(blobs|manifests)/`, Action: ActionSwarm}}
}

// Rules are asked in order; what none of them is for is direct.
type Rules []compiledRule

type compiledRule struct {
	match  *regexp.Regexp
	action Action
	to     *url.URL
}

// NewRules checks rules; the error begins with the key of what is wrong.
func NewRules(list []Rule) (Rules, error) {
	var rules Rules
	for i, r := range list {
		c, err := r.compile()
		if err != nil {
			return nil, fmt.Errorf("[%d].%w", i, err)
		}
		rules = append(rules, c)
	}
	return rules, nil
}

func (r Rule) compile() (c compiledRule, err error) {
	if r.Match == "" {
		return c, errors.New("match: want a regular expression that finds something in the URL")
	}
	if c.match, err = regexp.Compile(r.Match); err != nil {
		return c, fmt.Errorf("match: %w", err)
	}
	switch c.action = r.Action; r.Action {
	case ActionSwarm, ActionDirect, ActionRefuse:
		if r.To != "" {
			return c, fmt.Errorf("to: only of use with the action %s", ActionRedirect)
		}
	case ActionRedirect:
		if c.to, err = parseBase(r.To); err != nil {
			return c, fmt.Errorf("to: %w", err)
		}
	default:
		return c, fmt.Errorf("action %q: want %s, %s, %s or %s", r.Action, ActionSwarm, ActionDirect, ActionRedirect, ActionRefuse)
	}
	return c, nil
}

// Decide returns what becomes of a request, and where it goes. A URL is matched
// with its host in small letters and without a default port; where a rule refuses,
// also with its path in plain letters, so that no other spelling of it gets by.
func (r Rules) Decide(u *url.URL) (Action, *url.URL) {
	plain := url.URL{Scheme: u.Scheme, Host: plainHost(u), Path: u.Path, RawPath: u.RawPath}
	s := plain.String()
	plain.RawPath = ""
	decoded := plain.String()
	plain.Path = path.Clean("/" + u.Path)
	cleaned := plain.String()
	for _, rule := range r {
		refused := rule.action == ActionRefuse && (rule.match.MatchString(decoded) || rule.match.MatchString(cleaned))
		if !refused && !rule.match.MatchString(s) {
			continue
		}
		if rule.action != ActionRedirect {
			return rule.action, u
		}
		to := *u
		to.Scheme, to.Host, to.User = rule.to.Scheme, rule.to.Host, nil
		to.Path, to.RawPath = rule.to.Path+u.Path, ""
		if u.RawPath != "" {
			to.RawPath = rule.to.EscapedPath() + u.RawPath
		}
		return rule.action, &to
	}
	return ActionDirect, u
}

// plainHost is how a host is most likely written.
func plainHost(u *url.URL) string {
	port := u.Port()
	if u.Scheme == "http" && port == "80" || u.Scheme == "https" && port == "443" {
		port = ""
	}
	host := bracketed(strings.TrimSuffix(strings.ToLower(u.Hostname()), "."))
	if port != "" {
		host += ":" + port
	}
	return host
}
