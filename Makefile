# Everything runs in .venv, which the first call makes. Needed before: Python 3.11 or newer, and make.
# (GNU make 3.81, which macOS ships, is enough: no .ONESHELL, no grouped targets.)

VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip
PYTHON ?=
TORCH  ?=
ARGS   ?=
# One process more than there are cores to use, up to 4: tests wait for the processes that they start.
JOBS   ?= $(shell n=$$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null); n=$${n%%[!0-9]*}; \
	n=$${n:-2}; echo $$((n < 4 ? n + 1 : 4)))

COMMANDS := pretrain test bench gate aot gpu
TARGETS  := $(COMMANDS) help lint format clean

.DEFAULT_GOAL := help
.PHONY: $(TARGETS) FORCE
# Two targets at once (make -j2 pretrain test) would let two pips write into one .venv.
.NOTPARALLEL:

# make would run `pretrain` of `make pretrain aurora-photos` before it said that there is no target aurora-photos.
command := $(filter $(COMMANDS),$(MAKECMDGOALS))
unknown := $(filter-out $(TARGETS) .%,$(MAKECMDGOALS))
ifneq ($(unknown),)
$(error no target '$(unknown)': $(if $(command),type make $(command) ARGS='$(strip $(unknown) $(ARGS))',make help lists them))
endif

# `make pretrain steps=10` would set a variable of make's that nobody reads. make's own are written in capitals, and so is what is
# set here, as a command line goes before it. An outer make hands its own variables down, and pip reads https_proxy and the like.
override GIVEN  := $(foreach NAME,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(NAME)))),$(NAME)))
override FIELDS := $(if $(GIVEN),$(shell printf '%s\n' $(foreach NAME,$(GIVEN),'$(subst ','\'',$(NAME))') | LC_ALL=C sed -n '/[a-z]/p'))
override FIELDS := $(if $(filter 0,$(MAKELEVEL)),$(filter-out %_proxy,$(FIELDS)))
ifneq ($(FIELDS),)
$(error $(foreach NAME,$(FIELDS),$(NAME)=$($(NAME))) is nothing that make reads: write ARGS='$(strip $(ARGS) $(foreach NAME,$(FIELDS),--$(NAME) $($(NAME))))')
endif

help: ## show this list
	@echo "usage: make TARGET [ARGS='...'] [PYTHON=python3.12] [TORCH=torch==2.12.1 | TORCH=own]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1	\2/p' $(firstword $(MAKEFILE_LIST))
	@echo "ARGS are passed on to the command. TORCH says which torch .venv gets: torch==2.13.0 if nothing is said;"
	@echo "own = the one that PYTHON has already (2.11 or newer). JOBS = processes for tests, 0 = this one."

pretrain: $(VENV)/.installed-base ## pre-train Aurora: the tiny preset on generated pictures, or ARGS='PRESET --field value ...'
	$(PY) -m train.pretrain $(ARGS)

test: $(VENV)/.installed-test ## run the tests; AURORAIO_TEST_DATA=FOLDER adds those on real data
	$(PY) -m pytest -n $(JOBS) --dist loadfile --benchmark-disable $(ARGS)

bench: $(VENV)/.installed-test ## check, time and report: kernels, layers, a training step, the loader
	$(PY) -m pytest bench/ --benchmark-sort=name --benchmark-columns=min,median,max,rounds $(ARGS)

gate: $(VENV)/.installed-test ## the ratios of times that CI holds
	$(PY) -m bench.gate $(ARGS)

aot: $(VENV)/.installed-base ## compile every Triton kernel for sm_80 and sm_90; no GPU is needed
	$(PY) -m bench.aot $(ARGS)

# No .venv: a GPU machine has its own torch, and may be offline.
gpu: ## on a CUDA machine: GPU tests, benchmark, report, in 10 minutes (ARGS=--full: an hour; --rehearse: without a GPU)
	@$(or $(PYTHON),python3) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || \
		{ echo "make gpu: $(or $(PYTHON),python3) has no torch (2.11 or newer); name one that has: make gpu PYTHON=..." >&2; exit 2; }
	$(or $(PYTHON),python3) -m bench.gpu $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, mypy, and who imports whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev ## let ruff write the layout and the fixes that are safe
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv and what the tools left; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment -------------------------------------------------------------------------------------------

# torch comes first and alone; after that every install carries it as a constraint, because other packages (timm by
# way of torchvision) would replace it by their own choice. .venv/torch-choice remembers which TORCH was asked for.
$(VENV)/torch-choice: $(if $(filter-out $(shell cat $(VENV)/torch-choice 2>/dev/null),$(TORCH)),FORCE)
	@TORCH="$(TORCH)" PYTHON="$(PYTHON)" sh -e -c "$$MAKE_VENV"

# pip.conf carries the constraint into what is installed without make. It needs the whole path: .venv/checkout remembers
# for which folder it was written, and a checkout that was moved gets it anew.
$(VENV)/checkout: $(VENV)/torch-choice $(if $(findstring |$(CURDIR)|,|$(shell cat $(VENV)/checkout 2>/dev/null)|),,FORCE)
	@$(PY) -c "$$HOLD_TORCH"

# An extra contains the ones before it, so installing it leaves their stamps too.
$(VENV)/.installed-test: extra := [test]
$(VENV)/.installed-test: contains := base
$(VENV)/.installed-dev: extra := [dev]
$(VENV)/.installed-dev: contains := base test
$(VENV)/.installed-%: pyproject.toml $(VENV)/torch-choice | $(VENV)/checkout
	@$(PY) -c "$$CONSTRAINTS" > $(VENV)/constraints.txt
	@echo "Installing auroraio$(extra) into $(VENV) ..."
	$(PIP) install --quiet -c $(VENV)/constraints.txt -e '.$(extra)'
	@touch $@ $(contains:%=$(VENV)/.installed-%)

# The first interpreter that runs, is new enough and can make environments. Each is tried: pyenv's shims exist and fail.
define FIND_PYTHON
tried=
for python in $${PYTHON:-python3 python3.12 python3.11 python3.13}; do
    if ! version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
        why="is not there, or does not run"
    elif ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        why="is Python $$version"
    elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
        why="cannot make environments (Debian, Ubuntu: apt-get install python$$version-venv)"
    elif [ "$$TORCH" = own ] && ! "$$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
        why="has no torch, and TORCH=own asks for one"
    else
        echo "$$python"
        exit
    fi
    tried="$$tried
    $$python $$why"
done
echo "AuroraIO needs Python 3.11 or newer. Tried:$$tried
Name one: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
endef

# An environment that this file made is made anew for another TORCH; one that it finds (no torch-choice in it) is kept,
# and so is the torch inside unless TORCH names another.
define MAKE_VENV
if [ ! -x $(PY) ] || [ -f $(VENV)/torch-choice ]; then
    python=$$(sh -c "$$FIND_PYTHON")
    echo "Making $(VENV) with $$python"
    if [ "$$TORCH" = own ]; then
        "$$python" -m venv --clear --system-site-packages $(VENV)
        # where $$python is itself in an environment, its packages are not the system's
        where=$$("$$python" -c 'import importlib.util as u, os; print(os.path.dirname(os.path.dirname(u.find_spec("torch").origin)))')
        $(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' ||
            echo "$$where" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/own-torch.pth"
    else
        "$$python" -m venv --clear $(VENV)
    fi
fi
$(PIP) --version >/dev/null 2>&1 || $(PY) -m ensurepip
if [ "$$TORCH" != own ]; then
    if [ -n "$$TORCH" ] || ! $(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
        $(PIP) install $${TORCH:-torch==2.13.0}
    fi
fi
$(PY) -c "$$CONSTRAINTS" > $(VENV)/constraints.txt
echo "$$TORCH" > $(VENV)/torch-choice
endef

# Holds the torch that is installed, and the torchvision and torchcodec that fit it (0.28 and 0.13 go with torch 2.13, one
# up each time).
define CONSTRAINTS
import importlib.metadata, re, sys
if sys.version_info < (3, 11):
    sys.exit(f"$(VENV) has Python {sys.version.split()[0]}, AuroraIO needs 3.11 or newer: make clean, then again")
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit("$(VENV) has no torch: make clean, then again")
major, minor = map(int, re.match(r"(\d+)\.(\d+)", torch).groups())
if (major, minor) < (2, 11):
    sys.exit(f"torch {torch} is installed, AuroraIO needs 2.11 or newer: make TORCH=torch==2.13.0 ...")
print(f"torch=={torch}")
if major == 2:
    print(f"torchvision==0.{minor + 15}.*")
    print(f"torchcodec==0.{minor}.*")
endef

# Writes .venv/pip.conf. One that is there is the user's own: only a line that came from here is changed in it. The address
# is a URL because pip splits the value at spaces.
define HOLD_TORCH
import os, pathlib, re
conf = pathlib.Path("$(VENV)/pip.conf").absolute()
line = f"constraint = {conf.with_name('constraints.txt').as_uri()}"
new = f"# By make: pip keeps the torch that is here. For another one: make TORCH=torch==...\n[install]\n{line}\n"
text = conf.read_text() if conf.exists() else new
conf.write_text(re.sub(r"(?m)^constraint = file://\S*/$(VENV)/constraints\.txt$$", line, text))
conf.with_name("checkout").write_bytes(os.getcwdb())
endef
export FIND_PYTHON MAKE_VENV CONSTRAINTS HOLD_TORCH
