# Every target makes the virtual environment that it needs: .venv holds the runtime alone, .venv-dev everything.
PYTHON ?= python3
OUT ?= out
comma := ,
PACKAGES := engines runtime export trainer benchmarks
# Ranges live in pyproject.toml; these are the exact versions that were tested.
INSTALL = install --quiet --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow gpu-check bench check types clean
.DELETE_ON_ERROR:

demo: .venv/installed
	@mkdir -p $(OUT)
	.venv/bin/ipa-run --image runtime/assets/reference.png --prompt "a heart" --seed 0 --timings --output $(OUT)/demo.png

test: .venv-dev/installed
	.venv-dev/bin/pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow"

test-slow: .venv-dev/installed
	.venv-dev/bin/pytest -m slow

# GPU_EXTRAS: engines to install beside what the tests need, such as trt-cu13. Or GPU_PYTHON: an environment that has all
# of it already; with onnxruntime-gpu it must be one of its own, as that overwrites onnxruntime.
gpu-check: $(if $(GPU_PYTHON),,.venv-dev/installed)
	$(if $(GPU_EXTRAS),.venv-dev/bin/pip $(INSTALL) -e '.[dev$(comma)$(GPU_EXTRAS)]')
	$(or $(GPU_PYTHON),.venv-dev/bin/python) -m ipa.benchmarks.gpu_check --output $(OUT)

# The CPU set: the demo model on every engine and in PyTorch, speed and quality, and the report.
bench: .venv-dev/installed
	.venv-dev/bin/ipa-bench speed --model demo --output $(OUT)/bench
	.venv-dev/bin/ipa-bench quality --samples 1 --sweep 0,0.25,0.5,0.75,1 --output $(OUT)/bench
	.venv-dev/bin/ipa-bench report --records $(OUT)/bench --output $(OUT)/bench

check: .venv-dev/installed types
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/ruff check .
	.venv-dev/bin/mypy

# mypy needs the packages under the names they are imported by.
types:
	@mkdir -p build/types/ipa
	@for name in $(PACKAGES); do ln -sfn ../../../$$name build/types/ipa/$$name; done

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip $(INSTALL) -e '.[onnxruntime]'
	@touch $@

.venv-dev/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/pip $(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-dev build dist $(OUT) *.egg-info .mypy_cache .ruff_cache .pytest_cache
