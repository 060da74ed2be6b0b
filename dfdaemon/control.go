package dfdaemon

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// control is the host's own API, on the control socket.
type control struct {
	d *Daemon
	m *mirror
}

func (c *control) handler() http.Handler {
	e := gin.New()
	e.HandleMethodNotAllowed = true
	e.GET("/v1/status", c.status)
	e.POST(dfget.SocketContentPath, c.content)
	e.NoRoute(func(g *gin.Context) { refuse(g, http.StatusNotFound, api.CodeNotFound, "there is no such path") })
	e.NoMethod(func(g *gin.Context) {
		refuse(g, http.StatusMethodNotAllowed, api.CodeNotAllowed, "the method is not one of this path")
	})
	return e
}

func refuse(g *gin.Context, status int, code, message string) {
	g.Header(api.ErrorHeader, code)
	g.JSON(status, api.Error{Code: code, Message: message})
}

// Status is what GET /v1/status answers.
type Status struct {
	Supernode string       `json:"supernode"` // with which a session stands, "" for none
	Mirror    string       `json:"mirror"`    // host:port that engines pull from
	Store     StoreStatus  `json:"store"`
	Tasks     []TaskStatus `json:"tasks"`
}

// StoreStatus is how full the store is, in bytes.
type StoreStatus struct {
	Reserved int64 `json:"reserved"`
	Quota    int64 `json:"quota"` // 0 for no bound
	Evicted  int   `json:"evicted"`
}

// TaskStatus is one content in the store.
type TaskStatus struct {
	ID       pieces.TaskID `json:"id"`
	Length   int64         `json:"length"`
	Pieces   int           `json:"pieces"`
	Have     int           `json:"have"`
	Complete bool          `json:"complete"`
	LastUse  time.Time     `json:"lastUse"`
}

func (c *control) status(g *gin.Context) {
	base, _ := c.d.peer.Supernode()
	usage := c.d.store.Usage()
	s := Status{
		Supernode: base, Mirror: c.d.MirrorAddr(),
		Store: StoreStatus{usage.Reserved, usage.Quota, usage.Evicted}, Tasks: []TaskStatus{},
	}
	for _, h := range c.d.store.Tasks() {
		s.Tasks = append(s.Tasks, TaskStatus{h.ID, h.Layout.Length, h.Layout.Count(), h.Have.Len(), h.Complete, h.LastUse})
	}
	g.JSON(http.StatusOK, s)
}

const maxRequest = 64 << 10 // bytes

// content streams what the caller names. Where it is written is the caller's
// business: the agent opens no path of others.
func (c *control) content(g *gin.Context) {
	var in dfget.ContentRequest
	body := json.NewDecoder(http.MaxBytesReader(g.Writer, g.Request.Body, maxRequest))
	body.DisallowUnknownFields()
	if err := body.Decode(&in); err != nil {
		refuse(g, http.StatusBadRequest, api.CodeBadRequest, "the body is not a request for content: "+err.Error())
		return
	}
	_ = http.NewResponseController(g.Writer).SetReadDeadline(time.Time{}) // the body has come; the answer may take its time
	request, err := dfget.URLRequest(in.URL, in.Digest, in.Headers)
	if err != nil {
		refuse(g, http.StatusBadRequest, api.CodeBadRequest, err.Error())
		return
	}
	w := newReply(g)
	defer w.extend(0)
	if err := c.m.url(w, g.Request, request, nil); err != nil {
		refuse(g, http.StatusBadGateway, api.CodeUnavailable, err.Error())
	}
}
