package dfdaemon

import (
	"encoding/json"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// maxEarly is how many blobs of a manifest are opened before they are asked for.
const maxEarly = 64

// descriptor is what a manifest says of a blob.
type descriptor struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// ahead opens the small blobs that a manifest names: an engine that has asked
// for the manifest asks for them next, one after the other, and then each takes
// longer to ask for than to bring.
func (m *mirror) ahead(route registryproxy.Route, authorization string, manifest []byte) {
	var named struct {
		Config descriptor   `json:"config"`
		Layers []descriptor `json:"layers"`
	}
	if json.Unmarshal(manifest, &named) != nil {
		return
	}
	var early []dfget.Likely
	for _, d := range append([]descriptor{named.Config}, named.Layers...) {
		id, err := pieces.ParseTaskID(d.Digest)
		if err == nil && 0 < d.Size && d.Size <= api.MaxInline && len(early) < maxEarly {
			early = append(early, dfget.Likely{Request: dfget.Request{ID: id, Origin: origin(route, authorization)}, Size: d.Size})
		}
	}
	m.peer.Ahead(early)
}

// origin is where the supernode finds a blob, on behalf of a caller.
func origin(route registryproxy.Route, authorization string) api.Origin {
	o := api.Origin{Registry: route.Repo.Registry, Repository: route.Repo.Name}
	if authorization != "" {
		o.Header = map[string][]string{"Authorization": {authorization}}
	}
	return o
}
