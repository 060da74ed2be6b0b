# Damselfly. `make` alone lists what there is to make.

GO      ?= go
TAGS    := nomsgpack
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GOFLAGS_BUILD := -trimpath -tags $(TAGS) -ldflags "-s -w -X damselfly.dev/cmd/internal/cli.Version=$(VERSION)"
TOOL    := $(GO) tool -modfile=tools/go.mod

.PHONY: help build install test unit lint engines lab demo bench fuzz sbom vuln fmt clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build supernode, dfdaemon and dfget into bin/
	CGO_ENABLED=0 $(GO) build $(GOFLAGS_BUILD) -o bin/ ./cmd/...

install: ## install what the tests and the demo need (root, Debian 12)
	test/install.sh

test: install lint unit lab engines chaos-short tls-short ## everything: lint, unit, race, the region in one process, real engines

lint: ## formatting, layering and the linters
	$(TOOL) golangci-lint run ./...

unit: ## all that needs no root: unit tests, the region in one process
	$(GO) test -race -tags $(TAGS) -count=1 -timeout 10m $$($(GO) list ./... | grep -v -e /test/lab -e /test/engines -e /test/demo -e /test/load -e /test/bench -e /test/chaos -e /test/region)
	$(GO) test -race -tags $(TAGS) -count=1 -timeout 15m ./test/region

lab: build ## tests on network namespaces with shaped links (root)
	$(GO) test -p 1 -race -tags $(TAGS) -count=1 -timeout 15m ./test/lab/... ./test/demo/... ./test/bench/... ./test/load/...

engines: build ## real registries and engines pull through dfdaemon (root)
	$(GO) test -race -tags $(TAGS) -count=1 -timeout 20m ./test/engines/...

.PHONY: tls tls-short
tls-short: ## the region in one process again, with TLS between all parts, but for what takes minutes
	DAMSELFLY_TEST_TLS=1 $(GO) test -race -tags $(TAGS) -count=1 -timeout 10m -short -skip 'Trouble|SlowConnections|LargerThan|NobodyElse|RogueRegistry|Secrets' ./test/region

tls: build ## all of it again with TLS between all parts, and the engines (root; 20 min)
	DAMSELFLY_TEST_TLS=1 $(GO) test -p 1 -race -tags $(TAGS) -count=1 -timeout 30m ./test/region/... ./test/engines/...

.PHONY: chaos chaos-short
chaos: ## parts are killed, cut off, filled up and replaced while hosts pull (root; 70 min; CHAOSFLAGS="-only soak -seed 1")
	$(GO) run -tags $(TAGS) ./test/chaos $(CHAOSFLAGS)

chaos-short: ## the same for two minutes, with small images
	$(GO) test -race -tags $(TAGS) -count=1 -timeout 15m ./test/chaos/...

demo: ## one image to six hosts, with and without Damselfly (root: on shaped links)
	$(GO) run -tags $(TAGS) ./test/demo $(DEMOFLAGS)

bench: build ## speed, CPU and memory against their bounds (root; ~40 min; docs/performance.md)
	$(GO) test -tags $(TAGS) -run '^$$' -bench . -benchmem ./pieces/...
	$(GO) run -tags $(TAGS) ./test/bench $(BENCHFLAGS)

fuzz: ## every fuzz test for FUZZTIME (1m) each
	test/fuzz.sh $${FUZZTIME:-1m}

sbom: build ## what each program is built from, as CycloneDX in dist/
	@mkdir -p dist
	@for p in bin/*; do $(TOOL) cyclonedx-gomod bin -json -std -version $(VERSION) -output dist/$$(basename $$p).cdx.json $$p && echo dist/$$(basename $$p).cdx.json || exit 1; done

vuln: ## known vulnerabilities in what is used (VULNDB=URL for a mirror of their database)
	test/vuln.sh "$(TOOL)" $(TAGS) $(VULNDB)

fmt: ## format the code
	$(TOOL) golangci-lint fmt ./...

clean: ## remove what was built
	rm -rf bin
