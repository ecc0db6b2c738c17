# make demo | make pictures | make test | make test-avx2 | make fuzz | make check | make docs | make release: each sets up what it needs. Quotes keep paths with spaces whole.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files of tests side by side, in their order: the quick ones are last. Each process makes anew what files share, and needs some 2 GB.
# Their files lie in memory where it has room, as every small cache is synced to the disk some 190 times; what torch compiles stays on disk.
IN_MEMORY := $(shell [ -w /dev/shm ] && df --output=avail --block-size=1G /dev/shm | awk 'END { if ($$1 >= 4) print "/dev/shm" }')
COMPILED := /tmp/torchinductor_$(shell id -un)
PYTEST := $(if $(IN_MEMORY),TMPDIR=$${TMPDIR:-$(IN_MEMORY)} TORCHINDUCTOR_CACHE_DIR=$${TORCHINDUCTOR_CACHE_DIR:-$(COMPILED)}) "$(BIN)/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Tests whose numbers depend on a CPU's instructions.
NUMERICAL := tests/hdovd $(addprefix tests/pipelines/,teachers/test_clip_teacher.py teachers/test_dense_clip.py embedding/test_crop_embeddings.py \
             detection/test_detector.py evaluation/test_evaluate_stage.py export/test_export_model.py common/test_precision.py \
             extraction/test_pseudo_labels.py training/test_train_stage.py)

.PHONY: demo pictures test test-avx2 fuzz check docs release setup clean
.DELETE_ON_ERROR:

demo: setup
	"$(BIN)/python" -m hdovd demo

# The pictures of the README, of a new run of the demo.
pictures: setup
	"$(BIN)/python" -m hdovd demo --pictures docs/pictures

test: setup
	$(PYTEST)

# Once more as on a CPU without AVX-512, where this one has it.
test-avx2: setup
	if "$(BIN)/python" -c 'import sys, torch; sys.exit("AVX512" in torch.backends.cpu.get_cpu_capability())'; \
	then echo "this CPU has no AVX-512 that torch would use: its tests were those of AVX2"; \
	else ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(NUMERICAL); fi

# Ten times as many changed files as the tests have, and a hundred flipped bits of each kind: docs/RELIABILITY.md.
fuzz: setup
	HDOVD_FUZZ=8 HDOVD_FLIPS=100 "$(BIN)/python" -m pytest -q -s tests/hdovd/data/test_mutated_files.py tests/pipelines/runs/test_mutated_folders.py \
	  tests/pipelines/runs/test_flipped_bits.py

check: setup
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check --quiet .
	"$(BIN)/python" -m mypy
	"$(BIN)/python" -m mypy benchmarks
	"$(BIN)/python" tests/helpers/house.py
	$(PYTEST)

# The pages as a site, build/site: a dead link, or a name on the API page that is not there or says nothing, fails.
docs: setup
	"$(BIN)/python" -m uv pip install --quiet --python "$(BIN)/python" --editable ".[docs]"
	"$(BIN)/python" -m mkdocs build --quiet

# Wheel and sdist into dist/, checked, and the wheel tried in fresh environments: CONTRIBUTING.md.
release: setup
	"$(BIN)/python" -m uv pip install --quiet --python "$(BIN)/python" build twine
	"$(BIN)/python" benchmarks/release.py dist

setup: $(VENV)/installed

# uv installs torch together with the torchvision that fits it, and is many times faster than pip.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("hdovd needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV) || { echo "python3 cannot make virtual environments here: apt-get install python3-venv"; exit 1; }
	"$(BIN)/python" -m pip install --quiet uv
	"$(BIN)/python" -m uv pip install --quiet --python "$(BIN)/python" --editable ".[dev]"
	touch $(VENV)/installed

clean:
	rm -rf $(VENV) hdovd-demo build dist *.egg-info .pytest_cache
