# make help lists the targets. Everything needs Go; race needs a C compiler too,
# the node examples need node.

.DEFAULT_GOAL := help
SHELL := /bin/sh

GO       ?= go
PROGRAMS := tako-master tako-proxy tako-agent takoctl
VERSION  := $(shell cat VERSION)
# Empty outside git, "-dirty" with changes.
COMMIT   := $(shell git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null)
LDFLAGS  := -X tako/internal/version.Version=$(VERSION) -X tako/internal/version.Commit=$(COMMIT)
FUZZTIME ?= 30s
BENCHTIME ?= 1s
BENCH    ?=
# The tests that soak runs.
SOAK ?= NoRequestFails|InTime|DeadInstance|HungInstance|CrashLoop|Burst|ColdStart|ManyApps|Floods|BadApps|DataPath
# The tests that torture runs, in the order of their files.
TORTURE ?= Reload|Storm|AKilledProxy|AKilledAgent|NewProxy|WaitingConnections|ManagementSocket|NewImage|TwoImages|FreshStart|FollowedLogsGoOnThrough|KillingTheMaster|MasterThatDies|MasterKilledAgain|EmptiedStore|ChildrenOfAnotherVersion|Fire|FullDisk|PowerCut|SecondServer|TheSecond|TwoServers

# The packages that are quick to test, and those that run the real programs.
UNIT        = $(shell $(GO) list ./... | grep -v /internal/integration)
# Go does not see that they depend on the programs, so their results are not kept.
INTEGRATION := -count 1 -parallel 4 ./internal/integration/...
# A skip that .ci/skips does not list fails the run where CI is set.
# A test that fails and passes on its own is reported as flaky, up to ten of them.
GOTEST := $(GO) run tools/gotest/main.go tools/gotest/again.go -skips .ci/skips -again $(or $(AGAIN),10) $(if $(CI),-strict)
LINT   := $(GO) tool -modfile=tools/go.mod golangci-lint
# The race detector links against the C library.
CC_FOUND = $(shell command -v "$$($(GO) env CC 2>/dev/null)" 2>/dev/null)

# Ports of the demo.
HTTP  ?= 8080
HTTPS ?= 8443

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## the four programs, static, into bin/
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(PROGRAMS:%=./cmd/%)

.PHONY: demo
demo: build ## tako with two small apps on ports 8080 and 8443 (HTTP=, HTTPS= change them)
	@$(GO) build -o bin/examples/demo ./examples/demo
	@GO='$(GO)' bin/examples/demo --http $(HTTP) --https $(HTTPS)

.PHONY: demo-check
demo-check: build ## the same on free ports, asked and judged by itself
	@$(GO) build -o bin/examples/demo ./examples/demo
	@GO='$(GO)' bin/examples/demo --check

.PHONY: test
test: ## unit tests, the same under the race detector, integration; one verdict
	@$(GOTEST) -- tools -C tools ./gotest ./torture -- unit $(UNIT) $(if $(CC_FOUND),-- race -race -tags poison $(UNIT)) -- integration $(INTEGRATION)
	@$(if $(CC_FOUND),,echo 'no C compiler: the tests did not run under the race detector (on Debian: apt-get install gcc libc6-dev)')

.PHONY: unit
unit: ## unit tests
	@$(GOTEST) -- unit $(UNIT)

.PHONY: race
race: ## unit tests under the race detector, with used buffers spoilt
	@$(GOTEST) -- race -race -tags poison $(UNIT)

.PHONY: integration
integration: ## tests that run the real programs
	@$(GOTEST) -- integration $(INTEGRATION)

# Alone and one test after another: its bounds are those of a quiet machine.
.PHONY: soak
soak: ## rollouts, crashes and cold starts for minutes, with the numbers they are to keep
	@TAKO_SOAK=1 $(GOTEST) -again 0 -show -- soak -timeout 30m -run '$(SOAK)' $(INTEGRATION) -parallel 1

# In a PID and a network namespace of its own each, where the system allows it.
.PHONY: torture
torture: ## reloads, upgrades, deaths, full disks, power cuts under load, and a table of what was lost
	@$(GO) run tools/torture/main.go -run '$(TORTURE)' ./internal/integration

.PHONY: conformance
conformance: ## requests by the letter of the RFCs, h2spec, smuggling, a thousand slow clients, with counts
	@TAKO_CONFORMANCE=1 $(GOTEST) -show -- conformance -timeout 20m -run Conformance $(INTEGRATION)

.PHONY: integration-slow
integration-slow: ## the same with apps of real frameworks, installed by npm
	@TAKO_SLOW=1 $(GOTEST) -- integration-slow -timeout 30m $(INTEGRATION)

.PHONY: fuzz
fuzz: ## each fuzz target for FUZZTIME (30s)
	@GO='$(GO)' tools/fuzz.sh $(FUZZTIME)

.PHONY: bench
bench: ## tako beside nginx, HAProxy and Caddy in one run, about 20 minutes: docs/PERFORMANCE.md (BENCH= more flags)
	@$(GO) build -o bin/tools/bench ./bench
	bin/tools/bench $(BENCH)

.PHONY: bench-quick
bench-quick: ## the same beside nginx alone, in less than two minutes
	@$(GO) build -o bin/tools/bench ./bench
	bin/tools/bench --quick $(BENCH)

.PHONY: gobench
gobench: ## Go benchmarks of single packages, for comparing two commits on one machine
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) $(UNIT)

.PHONY: lint
lint: ## gofmt, go vet, golangci-lint
	@unformatted=$$(gofmt -l cmd internal examples tools bench); [ -z "$$unformatted" ] || { echo "not formatted (make fmt):"; echo "$$unformatted"; exit 1; }
	$(GO) vet ./...
	for example in examples/*/go.mod; do $(GO) vet -C "$${example%/go.mod}" ./... || exit 1; done
	$(LINT) run

.PHONY: fmt
fmt: ## format the code
	$(LINT) fmt
	gofmt -w examples tools

.PHONY: clean
clean: ## remove what make built
	rm -rf bin dist
