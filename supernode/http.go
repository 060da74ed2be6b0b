package supernode

import (
	"cmp"
	"encoding/json"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

func (n *Supernode) routes(reg Registry) *gin.Engine {
	gin.SetMode(gin.ReleaseMode)
	e := gin.New()
	e.HandleMethodNotAllowed = true
	e.RedirectTrailingSlash = false
	e.Use(n.logged, n.recovered)
	reads := []string{http.MethodGet, http.MethodHead}
	fine := func(c *gin.Context) { c.String(http.StatusOK, "ok\n") }
	e.Match(reads, "/healthz", fine)
	e.Match(reads, "/readyz", n.takesWork, n.ready)
	metrics := e.Group("/metrics")
	if n.cfg.ProtectMetrics {
		metrics.Use(n.rights.want(RoleRead))
	}
	metrics.GET("", gin.WrapH(promhttp.HandlerFor(reg, promhttp.HandlerOpts{})))
	e.GET(api.SessionPath, n.takesWork, n.known, func(c *gin.Context) { n.serveSession(c.Writer, c.Request) })
	e.Match(reads, api.TasksPath+"/:task/content", n.known, func(c *gin.Context) {
		n.serveContent(c.Writer, c.Request, c.Param("task"))
	})
	e.GET(api.TasksPath, n.rights.want(RoleRead), n.listTasks)
	e.GET("/v1/hosts", n.rights.want(RoleRead), n.listHosts)
	e.DELETE(api.TasksPath+"/:task", n.rights.want(RoleAdmin), n.forgetTask)
	if n.ca != nil {
		e.POST(identity.JoinPath, func(c *gin.Context) { n.serveJoin(c.Writer, c.Request) })
	}
	for _, path := range []string{"/v2", "/v2/*path"} {
		e.Any(path, n.takesWork, func(c *gin.Context) { n.serveV2(c.Writer, c.Request, c.Param("path")) })
	}
	e.NoRoute(func(c *gin.Context) {
		writeError(c.Writer, http.StatusNotFound, api.CodeNotFound, "there is nothing at this path")
	})
	e.NoMethod(func(c *gin.Context) {
		writeError(c.Writer, http.StatusMethodNotAllowed, api.CodeNotAllowed, "this path takes other methods")
	})
	return e
}

// logged logs requests, without their query.
func (n *Supernode) logged(c *gin.Context) {
	e := n.log.Check(zap.DebugLevel, "request")
	if e == nil {
		return
	}
	begin := time.Now()
	c.Next()
	e.Write(zap.String("method", c.Request.Method), zap.String("path", c.Request.URL.Path),
		zap.String("remote", c.Request.RemoteAddr), zap.Duration("took", time.Since(begin)))
}

// recovered keeps a panic to the request it came from.
func (n *Supernode) recovered(c *gin.Context) {
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			panic(p)
		default:
			n.log.Error("panic in a handler", zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			panic(http.ErrAbortHandler)
		}
	}()
	c.Next()
}

// writeError answers with an error in the form of the API.
func writeError(w http.ResponseWriter, status int, code, message string) {
	b, _ := json.Marshal(api.Error{Code: code, Message: message}) // strings always marshal
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(b)))
	h.Set("Cache-Control", "no-store")
	h.Set(api.ErrorHeader, code)
	w.WriteHeader(status)
	_, _ = w.Write(b) // whoever went away needs no answer
}

// takesWork sends who begins something elsewhere while the supernode drains.
func (n *Supernode) takesWork(c *gin.Context) {
	if n.draining.Load() {
		writeError(c.Writer, http.StatusServiceUnavailable, api.CodeUnavailable, errStopping.Error())
		c.Abort()
	}
}

func (n *Supernode) ready(c *gin.Context) {
	if n.ctx.Err() != nil {
		writeError(c.Writer, http.StatusServiceUnavailable, api.CodeUnavailable, errStopping.Error())
		return
	}
	c.String(http.StatusOK, "ok\n")
}

// taskInfo is a content that the supernode has.
type taskInfo struct {
	ID        string    `json:"id"`
	Length    int64     `json:"length"`
	PieceSize int64     `json:"pieceSize"`
	Pieces    int       `json:"pieces"`
	Have      int       `json:"have"`
	Complete  bool      `json:"complete"`
	Hosts     int       `json:"hosts"` // that have joined it
	LastUse   time.Time `json:"lastUse"`
}

func (n *Supernode) listTasks(c *gin.Context) {
	held := n.store.Tasks()
	infos := make([]taskInfo, len(held))
	for i, t := range held {
		infos[i] = taskInfo{
			string(t.ID), t.Layout.Length, t.Layout.PieceSize, t.Layout.Count(), t.Have.Len(), t.Complete, 0, t.LastUse,
		}
	}
	ok := n.region.ask(c.Request.Context(), func() {
		for i := range held {
			if t := n.region.tasks[held[i].ID]; t != nil {
				infos[i].Hosts = len(t.members)
			}
		}
	})
	n.list(c, infos, ok)
}

// forgetTask drops a content from the supernode and all hosts.
func (n *Supernode) forgetTask(c *gin.Context) {
	status, code, err := n.origin.forget(c.Param("task"))
	if err != nil {
		writeError(c.Writer, status, code, err.Error())
		return
	}
	c.Status(status)
}

// hostInfo is a host with a session; the first of the list is the supernode.
type hostInfo struct {
	ID        string    `json:"id"`
	Address   string    `json:"address,omitempty"`
	Since     time.Time `json:"since,omitzero"`
	Tasks     int       `json:"tasks"`     // that it holds some of
	Transfers int       `json:"transfers"` // to it, under way
	Banned    bool      `json:"banned,omitempty"`
}

func (n *Supernode) listHosts(c *gin.Context) {
	infos := []hostInfo{}
	ok := n.region.ask(c.Request.Context(), func() {
		for _, s := range n.region.hosts {
			infos = append(infos, hostInfo{
				s.name, s.addr, s.since, len(s.holds), len(s.transfers), n.region.sched.Banned(s.id),
			})
		}
	})
	if ok {
		slices.SortFunc(infos, func(a, b hostInfo) int { return cmp.Compare(a.ID, b.ID) })
		self := hostInfo{ID: "supernode", Address: cmp.Or(n.cfg.Advertise, n.cfg.Listen), Tasks: n.store.Usage().Tasks}
		infos = slices.Insert(infos, 0, self)
	}
	n.list(c, infos, ok)
}

func (n *Supernode) list(c *gin.Context, v any, ok bool) {
	if !ok {
		writeError(c.Writer, http.StatusServiceUnavailable, api.CodeUnavailable, errStopping.Error())
		return
	}
	c.JSON(http.StatusOK, v)
}
