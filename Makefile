VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Two processes; each may take 5 GB. Files come as tests/conftest.py orders them, which xdist would reorder. Bytecode is
# kept: pytest's is dear to make, and every process that tests start reads that of the rooms.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

ROOMS := protos kernels cache_manager engine_impl server benchmarks cli

NATIVE := setup.py $(wildcard kernels/native/*.cc kernels/native/*.h)  # what `pip install` compiles

.PHONY: demo test test-fast product gates gpu-gates web-test tools-test ray-test native-check arm-check setup check protos manifests rules clean

demo: $(VENV)/.runtime           ## serve the embedded model, ask it a question, stop
	@$(BIN)/slipstream demo

test: $(VENV)/.test              ## the whole suite
	$(PYTEST)

test-fast: $(VENV)/.test         ## what does not take long
	$(PYTEST) -m "not slow and not product and not gates and not gpu_gates and not web and not tools and not ray"

product: $(VENV)/.test           ## whole cross products, where the suite has a covering set
	$(PYTEST) -m product

gates: $(VENV)/.test             ## every program x heads x head dim x chip, by the TPU compiler
	$(PYTEST) tests/gates -m "not gpu_gates"

gpu-gates: $(VENV)/.test         ## the same for an H100; installs XLA's GPU compiler (175 MB), no GPU needed
	$(BIN)/python -m pip install jax-cuda12-pjrt==$$($(BIN)/python -c "import jaxlib; print(jaxlib.__version__)")
	$(PYTEST) tests/gates/test_gpu.py -m gpu_gates

web-test: $(VENV)/.test          ## the page to try the model, in a real headless Chromium (Debian's package)
	@command -v chromium > /dev/null || { echo "chromium is missing: apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pytest tests/web -m web

tools-test: $(VENV)/.test        ## manifests by kubectl, alerts by promtool, scripts by shellcheck; fails without one of them
	$(BIN)/python -m pytest tests/deploy tests/cli/test_plan_manifest.py -m tools

ray-test: $(VENV)/.test          ## replicas under a real Ray Serve here: minutes, 6 GB; ends every Ray of yours on this machine
	$(BIN)/python -m pytest tests/server/ray -m ray

CHECKED := tests/kernels/native_check.cc $(filter-out %/ffi.cc %/experts.cc,$(wildcard kernels/native/*.cc))

native-check: .pytest_cache/native_check ## the CPU kernels in C++ against plain loops, under sanitizers
	.pytest_cache/native_check

arm-check: .pytest_cache/native_check.aarch64 ## the same for 64-bit Arm, emulated, as installed; fails without its tools
	qemu-aarch64 $<

.pytest_cache/native_check: $(CHECKED) $(NATIVE)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -pthread -fsanitize=address,undefined \
		-fno-sanitize-recover=undefined -o $@ $(CHECKED)

.pytest_cache/native_check.aarch64: CXX = aarch64-linux-gnu-g++
.pytest_cache/native_check.aarch64: $(CHECKED) $(NATIVE)
	@for tool in $(CXX) qemu-aarch64; do command -v $$tool > /dev/null || { \
		echo "$$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	mkdir -p $(@D)
	$(CXX) $(STATIC) -o $@ $(CHECKED)

.pytest_cache/native_check.static: $(CHECKED) $(NATIVE)   # for an emulator of a CPU with other instructions
	mkdir -p $(@D)
	$(CXX) $(STATIC) -o $@ $(CHECKED)

STATIC := -std=c++17 -O3 -Wno-psabi -Wno-maybe-uninitialized -pthread -static

setup: $(VENV)/.test             ## the environment for development

check: $(VENV)/.test .pkg          ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

protos: $(VENV)/.test            ## regenerate the stubs
	$(BIN)/python protos/generate.py

OVERLAYS := $(notdir $(wildcard deploy/kubernetes/overlays/*))

manifests: $(OVERLAYS:%=deploy/kubernetes/rendered/%.yaml)   ## render every overlay; needs kubectl 1.27 or later

rules:                           ## check and test the alerts; needs promtool (Debian: apt install prometheus)
	promtool check rules deploy/monitoring/rules.yaml
	promtool test rules deploy/monitoring/rules_test.yaml

deploy/kubernetes/rendered/%.yaml: FORCE
	kubectl kustomize deploy/kubernetes/overlays/$* --output $@

FORCE:

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable '.[test]'
	$(BIN)/python -m pip install --no-deps google-jetstream==0.2.2
	@touch $@ $(VENV)/.runtime

.pkg: ; mkdir -p .pkg/slipstream   # the rooms under the name that they are imported by: pyright does not see editable ones
	for room in $(ROOMS); do ln -sfn ../../$$room .pkg/slipstream/$$room; done

clean:
	rm -rf $(VENV) .pkg .pytest_cache build *.egg-info kernels/native/*.so
