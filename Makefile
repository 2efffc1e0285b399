# rootlink: two commands do all the set-up on a fresh machine.
#
#   make demo      the whole chain on a software TPM, then what it refuses
#   make test      everything: unit, race, fuzz seeds, end to end on swtpm
#   make interop   stock cosign, Witness, in-toto, openssl and others as judges
#
# The rest: build, lint, bench, interop-bench, proto, clean.

GO       ?= go
BIN      := bin
BINARIES := $(BIN)/rootlink-server $(BIN)/rootlink-agent $(BIN)/rootlink \
            $(BIN)/rootlink-tpmnode $(BIN)/rootlink-workloadattestor
# What --version says. Empty without git or its history: then the programs say
# what the Go command recorded.
VERSION  := $(if $(wildcard .git),$(shell git describe --tags --always --dirty 2>/dev/null))
LDFLAGS  := -s -w $(if $(VERSION),-X github.com/rootlink/rootlink/internal/version.linked=$(VERSION))

.PHONY: all demo test interop interop-bench lint bench build proto setup clean $(BINARIES)

all: build

build: $(BINARIES)

$(BIN)/rootlink-server:           PKG := ./cmd/server
$(BIN)/rootlink-agent:            PKG := ./cmd/agent
$(BIN)/rootlink:                  PKG := ./cmd/rootlink
$(BIN)/rootlink-tpmnode:          PKG := ./plugins/tpmnode
$(BIN)/rootlink-workloadattestor: PKG := ./plugins/workloadattestor

$(BINARIES):
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ $(PKG)

setup:
	@scripts/setup

demo: setup build
	@CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/demo/ ./examples/mkimage ./examples/mksbom ./examples/resign ./examples/vulnscan
	@examples/demo

# The race detector needs cgo; the linker and the timeouts are sized for two cores.
test: setup build
	@scripts/setup test
	ROOTLINK_BIN=$(CURDIR)/$(BIN) $(GO) test -race -count=1 -timeout 20m ./...

# Builds the peers first, about three minutes on two cores; they stay in the cache.
interop: setup build
	@scripts/setup interop
	ROOTLINK_BIN=$(CURDIR)/$(BIN) scripts/interop

# The same beside in-toto-golang and go-witness, on the same files.
interop-bench: setup build
	@ROOTLINK_BIN=$(CURDIR)/$(BIN) scripts/interop-bench

lint:
	@scripts/lint

bench: setup build
	@ROOTLINK_BIN=$(CURDIR)/$(BIN) scripts/bench

# Only after a change of a .proto file; needs protoc.
proto:
	@scripts/proto

clean:
	rm -rf $(BIN)
