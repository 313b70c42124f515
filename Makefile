# The commands of this repository. `make help` lists them; CONTRIBUTING.md explains them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
# What the cluster is made with: auto, built, kind or existing; see tests/cluster/README.md.
CLUSTER ?= auto
# File systems, from Debian.
FILE_SYSTEMS := moosefs-master moosefs-chunkserver moosefs-client iproute2 e2fsprogs xfsprogs btrfs-progs
# Where root runs tests, they mount in a namespace of their own: however they end, their mounts and loop devices go with them.
OWN_MOUNTS = $(shell [ "$$(id -u)" != 0 ] || echo unshare --mount --propagation private)
# Jobs of two pods that are repeated on each file system; .ci/run leaves them out, for its time.
JOBS_ON_FILE_SYSTEMS ?= matrix.py pods.py::test_in_prefix_mode_no_port_is_opened_and_the_jobs_store_does_not_grow \
  pods.py::test_pods_whose_slots_are_all_whole_take_one_for_a_load_from_storage
# Where long runs leave their raw results, one JSON line each.
REPORT ?= scratch/report
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.set-up
# Frameworks of training code want other versions of what torch brings, so their tests have an environment of their own.
VENV_FRAMEWORKS  := .venv-frameworks
STAMP_FRAMEWORKS := $(VENV_FRAMEWORKS)/.set-up
# The oldest torch that trainers may have; see requirements/oldest.in.
VENV_OLDEST := .venv-oldest
STAMP_OLDEST := $(VENV_OLDEST)/.set-up
# What writes the bills of materials of a release; see requirements/release.in.
VENV_RELEASE  := .venv-release
STAMP_RELEASE := $(VENV_RELEASE)/.set-up
# One environment for each Python and torch that the wheels are tried with.
VENV_WHEELS := .venv-wheels
UV_FRAMEWORKS    := $(BIN)/uv pip install --quiet --python $(VENV_FRAMEWORKS)/bin/python
# uv trusts the machine's certificates as pip does; where they are the usual ones this changes nothing.
export UV_SYSTEM_CERTS := 1
UV_PIP := $(BIN)/uv pip install --quiet --python $(BIN)/python
LOCK   := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url

TYPED := $(wildcard client/src sidecar/src operator/src tests tools benchmarks examples)

.PHONY: help setup lock check test test-frameworks test-filesystem test-cluster test-owners object-stores cluster-programs cluster-up cluster-down fuzz matrix campaign soak demo demo-cluster wheels test-wheels release-archives test-release test-oldest-torch bench bench-cluster clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(STAMP)  ## make .venv from the lock; does nothing when nothing changed

# pip installs one tool, uv, at a pinned version and hash; uv installs the rest. The build back end is in the lock too,
# so that installing our own three downloads nothing.
$(STAMP): requirements/uv.lock requirements/dev.lock client/pyproject.toml sidecar/pyproject.toml operator/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Pillion needs Python 3.11 or newer; this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock
	# Compiled once: the tests start hundreds of processes, and each would compile torch anew where Python may write no bytecode.
	$(UV_PIP) --compile-bytecode --require-hashes -r requirements/dev.lock
	$(UV_PIP) --no-deps --no-build-isolation -e client -e sidecar -e operator
	touch $@

lock: $(STAMP)  ## pin requirements/*.in anew; versions already locked stay (remove the file to take the newest)
	$(LOCK) requirements/uv.in -o requirements/uv.lock
	$(LOCK) requirements/dev.in -o requirements/dev.lock
	$(LOCK) --constraint <(sed -E '/^(fsspec|setuptools)==/d; /^ /d; s/ \\$$//' requirements/dev.lock) requirements/frameworks.in -o requirements/frameworks.lock
	$(LOCK) requirements/s3fs.in -o requirements/s3fs.lock
	$(LOCK) requirements/oldest.in -o requirements/oldest.lock
	$(LOCK) requirements/release.in -o requirements/release.lock
	for image in build sidecar operator; do \
	  $(LOCK) --constraint requirements/dev.lock requirements/$$image.in -o requirements/$$image.lock; done

check: $(STAMP)  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports

test: $(STAMP)  ## every test that this machine can run; ARGS="tests/unit -k name" narrows it
	$(BIN)/python -m pytest $(ARGS)

$(STAMP_FRAMEWORKS): $(STAMP) requirements/frameworks.lock
	test -x $(VENV_FRAMEWORKS)/bin/python || $(PYTHON) -m venv --without-pip $(VENV_FRAMEWORKS)
	$(UV_FRAMEWORKS) --compile-bytecode --require-hashes -r requirements/frameworks.lock
	$(UV_FRAMEWORKS) --no-deps --no-build-isolation -e client -e sidecar
	touch $@

# Their own warnings are not ours to mend, so none is an error there.
test-frameworks: $(STAMP_FRAMEWORKS)  ## training code of Transformers, Lightning, torchtitan, Accelerate, Ray and others with Pillion; installs them, once
	$(VENV_FRAMEWORKS)/bin/python -m pytest tests/frameworks --frameworks -W default $(ARGS)

test-cluster: $(STAMP)  ## the stories on a real Kubernetes, made and taken down here; needs root, Go, Debian packages
	$(BIN)/python -m pytest tests/cluster --ignore tests/cluster/owners --cluster $(CLUSTER) $(ARGS)

# Their images are built here and brought to the nodes, which only this provider can do.
test-owners: $(STAMP)  ## jobs of real launchers on it: PyTorchJob, Kueue, RayJob; and cert-manager; built from their Go modules
	$(BIN)/python -m pytest tests/cluster/owners --cluster built $(ARGS)

# The tests say themselves what is missing where this cannot install it.
test-filesystem: $(STAMP)  ## storage on ext4, XFS, btrfs, tmpfs and a shared file system, mounted twice; needs root, Debian packages
	missing="$$(for each in mfsmaster mfschunkserver mfsmount mkfs.ext4 mkfs.xfs mkfs.btrfs; do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $$each > /dev/null || echo $(FILE_SYSTEMS); done)"; \
	if [[ -n "$$missing" && "$$(id -u)" == 0 ]] && command -v apt-get > /dev/null; then \
	  DEBIAN_FRONTEND=noninteractive apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(FILE_SYSTEMS) > /dev/null; fi
	$(OWN_MOUNTS) $(BIN)/python -m pytest $(addprefix tests/storage_contract/test_,files.py bulk.py commits.py two_mounts.py) \
	  $(addprefix --file-system ,ext4 xfs btrfs tmpfs moosefs) $(ARGS)
	PILLION_MATRIX=file-systems $(OWN_MOUNTS) $(BIN)/python -m pytest $(addprefix tests/distributed/test_,shared_filesystem.py $(JOBS_ON_FILE_SYSTEMS)) $(addprefix --file-system ,ext4 xfs btrfs) $(ARGS)

object-stores: $(STAMP)  ## the servers of S3 and Azure that tests write to, and s3fs, which reads there; kept in a cache; needs Go and npm
	cd tests && ../$(BIN)/python -m support.object_stores.programs

cluster-programs: $(STAMP)  ## what test-cluster compiles and installs, kept in a cache; needs root, Go, Debian packages
	cd tests && ../$(BIN)/python -m cluster.harness prepare --cluster $(CLUSTER)

cluster-up: $(STAMP)  ## a real Kubernetes of two nodes, for people; says how to reach it
	cd tests && ../$(BIN)/python -m cluster.harness up --cluster $(CLUSTER)

cluster-down: $(STAMP)  ## take it down again
	cd tests && ../$(BIN)/python -m cluster.harness down --cluster $(CLUSTER)

fuzz: $(STAMP)  ## feed RUNS (a million) inputs to what strangers can reach; SEED=2 for others, ARGS=admission for one target
	cd tests && ../$(BIN)/python -m fuzz --runs $(or $(RUNS),1000000) --seed $(or $(SEED),1) $(ARGS)

matrix: $(STAMP)  ## every phase broken by every fault that fits (an hour); writes docs/records/matrix.md
	mkdir -p $(dir $(REPORT)); rm -f $(REPORT).matrix
	PILLION_MATRIX=all PILLION_MATRIX_REPORT=$(abspath $(REPORT)).matrix $(BIN)/python -m pytest tests/distributed/test_matrix.py tests/distributed/test_stories.py tests/distributed/test_store_faults.py tests/distributed/test_bucket_pods.py $(ARGS)
	$(BIN)/python tools/reliability.py matrix $(REPORT).matrix

campaign: $(STAMP)  ## RUNS (100) jobs under torchrun, struck at random by their seeds from SEED (1) on, each checked bit for bit
	mkdir -p $(dir $(REPORT)); rm -f $(REPORT).campaign
	cd tests && PYTHONPATH=. ../$(BIN)/python -m campaign --runs $(or $(RUNS),100) --seed $(or $(SEED),1) --report $(abspath $(REPORT)).campaign $(ARGS)

soak: $(STAMP)  ## RUNS (3000) saves and restores in one job; memory, descriptors, threads and keys stay flat
	mkdir -p $(dir $(REPORT))
	cd tests && PYTHONPATH=. ../$(BIN)/python -m campaign.soak --rounds $(or $(RUNS),3000) --report $(abspath $(REPORT)).soak $(ARGS)

demo: $(STAMP)  ## train, kill a rank, resume from memory, compare bit for bit (some minutes); ARGS=--s3 keeps checkpoints in a bucket
	$(BIN)/python examples/charlm/demo.py $(ARGS)

demo-cluster: $(STAMP)  ## the same on a cluster: two pods on two nodes, a crash, a deleted pod; made and taken down here
	cd tests && ../$(BIN)/python -m cluster.demo --cluster $(CLUSTER) $(ARGS)

bench: $(STAMP)  ## measure stall, persist and load against stock DCP
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-cluster: $(STAMP)  ## measure webhook, controller and pod start on a real Kubernetes, made and taken down here
	PYTHONPATH=tests $(BIN)/python benchmarks/bench_cluster.py $(ARGS)

wheels: $(STAMP)  ## build wheels and sdists of client, sidecar and operator into dist/, the same bytes on every machine
	$(BIN)/python tools/build_wheels.py dist

# Made anew each time: what is tried is what pip installs where nothing of Pillion is.
test-wheels: wheels  ## the wheels as pip installs them, each CPython that is here, by the laptop page's commands; PYTHONS=3.12 narrows it (10 GB)
	$(BIN)/python tools/wheel_environments.py $(VENV_WHEELS) $(PYTHONS)
	PILLION_WHEEL_ENVIRONMENTS=$(abspath $(VENV_WHEELS)) $(BIN)/python -m pytest tests/distributed/test_wheels.py $(ARGS)

$(STAMP_RELEASE): $(STAMP) requirements/release.lock
	test -x $(VENV_RELEASE)/bin/python || $(PYTHON) -m venv --without-pip $(VENV_RELEASE)
	$(BIN)/uv pip install --quiet --python $(VENV_RELEASE)/bin/python --require-hashes -r requirements/release.lock
	touch $@

release-archives: $(STAMP_RELEASE)  ## wheels, sdists, the chart (needs helm), bills of materials and SHA256SUMS into dist/, the same bytes on every machine
	$(BIN)/python tools/release_archives.py dist --sbom $(VENV_RELEASE)/bin/cyclonedx-py $(ARGS)

test-release: $(STAMP_RELEASE)  ## what release-archives makes, with the program of the bills, which make test lacks
	PILLION_CYCLONEDX=$(abspath $(VENV_RELEASE))/bin/cyclonedx-py $(BIN)/python -m pytest tests/process/test_release_archives.py $(ARGS)

$(STAMP_OLDEST): $(STAMP) requirements/oldest.lock
	test -x $(VENV_OLDEST)/bin/python || $(PYTHON) -m venv --without-pip $(VENV_OLDEST)
	$(BIN)/uv pip install --quiet --python $(VENV_OLDEST)/bin/python --compile-bytecode --require-hashes -r requirements/oldest.lock
	touch $@

test-oldest-torch: $(STAMP_OLDEST)  ## trainers on torch 2.6 beside sidecars on the newest, as in a cluster of old images; installs it, once (5 GB)
	PILLION_OLDEST_TORCH_PYTHON=$(abspath $(VENV_OLDEST))/bin/python $(BIN)/python -m pytest tests/distributed/test_oldest_torch.py $(ARGS)

clean:  ## remove what the tools made; .venv too
	rm -rf dist $(VENV) $(VENV_FRAMEWORKS) $(VENV_OLDEST) $(VENV_WHEELS) $(VENV_RELEASE) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache scratch
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
