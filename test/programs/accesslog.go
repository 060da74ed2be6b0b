//go:build linux

package programs

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
)

// An accessLog is a server's own log, in the combined format.
type accessLog struct {
	path string
	skip int64 // bytes that are of no interest
}

// A Request is a line of a registry's own log.
type Request struct {
	Client       netip.Addr
	User         string // of its Basic credentials, "-" for none
	Method, Path string
	Status       int
	Bytes        int64 // of the body as sent
}

// Content says whether the request brought bytes of an image.
func (q Request) Content() bool {
	return q.Method == http.MethodGet && q.Status/100 == 2 && (strings.Contains(q.Path, "/blobs/") || strings.Contains(q.Path, "/manifests/"))
}

// Forget makes Requests begin anew.
func (l *accessLog) Forget() error {
	info, err := os.Stat(l.path)
	if err != nil {
		return fmt.Errorf("read the registry's log: %w", err)
	}
	l.skip = info.Size()
	return nil
}

// accessLine is the combined log format.
var accessLine = regexp.MustCompile(`^(\S+) \S+ (\S+) \[[^\]]*\] "(\S+) (\S+) [^"]*" (\d+) (\d+) `)

// Requests are what the registry has answered since the last push or Forget.
// It writes them down when the answer has ended.
func (l *accessLog) Requests() ([]Request, error) {
	log, err := os.Open(l.path)
	if err != nil {
		return nil, fmt.Errorf("read the registry's log: %w", err)
	}
	defer log.Close()
	if _, err := log.Seek(l.skip, 0); err != nil {
		return nil, fmt.Errorf("read the registry's log: %w", err)
	}
	var requests []Request
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		if q, ok := parse(lines.Text()); ok {
			requests = append(requests, q)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the registry's log: %w", err)
	}
	return requests, nil
}

// parse reads a line of the combined log; the program's own messages are none.
func parse(line string) (Request, bool) {
	m := accessLine.FindStringSubmatch(line)
	if m == nil {
		return Request{}, false
	}
	client, errClient := netip.ParseAddr(m[1])
	status, errStatus := strconv.Atoi(m[5])
	n, errBytes := strconv.ParseInt(m[6], 10, 64)
	path, _, _ := strings.Cut(m[4], "?")
	return Request{Client: client, User: m[2], Method: m[3], Path: path, Status: status, Bytes: n}, errors.Join(errClient, errStatus, errBytes) == nil
}
