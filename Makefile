# Every target makes the virtual environment that it needs; only Python (3.10 to 3.13) and make must be there.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
INTEROP_VENV ?= .venv-interop
# What the parity environment compares against. A CPU build of torch is enough: name another one here.
TORCH ?= torch==2.13.0
# Processes that share the tests, file by file.
JOBS ?= 2
# The Triton that kernels are measured under and shipped ones are built by, and those that all must compile under, newest last.
TRITON ?= 3.6.0
TRITONS ?= $(TRITON) 3.7.1 3.8.0 3.9.0
ARGS ?=
MINUTES ?= 2
# Seconds after which a single fuzz is stuck: the longest of MINUTES, and a failing example is made small.
FUZZ_TIMEOUT ?= 1800

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-parallel test mutants mutants-some mutants-parity mutants-parity-some fuzz gpu-test parity parity-newest interop lint wheel release-check eval-demo \
	triton-matrix triton-newest shipped clean
.DEFAULT_GOAL := demo

$(VENV)/.cpu: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14) and "Paddle 3.3.1 needs Python 3.10 to 3.13, this is " + sys.version.split()[0] + ": name another, make PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e '.[cpu,eval]' 'triton==$(TRITON)'
	touch $@

$(VENV)/.test: $(VENV)/.cpu
	$(VENV)/bin/pip install -q -e '.[cpu,eval,test]'
	touch $@

$(PARITY_VENV)/.done: pyproject.toml setup.py
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/pip install -q '$(TORCH)'
	$(PARITY_VENV)/bin/pip install -q -e '.[cpu,eval,test,train,parity]'
	touch $@

$(INTEROP_VENV)/.done: pyproject.toml setup.py
	$(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/pip install -q -e '.[cpu,ppdiffusers]' 'pytest>=8' 'pytest-timeout>=2.3'
	touch $@

demo: $(VENV)/.cpu  ## make a video with low-bit attention on the CPU: make demo ARGS='--prompt "..." --compare'
	$(VENV)/bin/python examples/cogvideo.py $(ARGS)

demo-parallel: export OMP_NUM_THREADS ?= 1
demo-parallel: $(VENV)/.cpu  ## one video on two processes over gloo, and again on one: the same, and what was sent
	env -u CUDA_VISIBLE_DEVICES $(VENV)/bin/python -m paddle.distributed.launch --nproc_per_node 2 --log_dir outputs/parallel \
		examples/parallel.py --cfg-degree 1 $(ARGS)

test parity: export OMP_NUM_THREADS ?= 1
# Where nothing compiled is kept, both workers and each of some sixty processes compile this tree again: a second or more a time.
test parity: export PYTHONDONTWRITEBYTECODE :=
# No test but a fuzz needs these plug-ins, which load for half a second in each process.
test: $(VENV)/.test  ## the test suite; GPU tests skip by name where there is no GPU
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -p no:hypothesispytest -p no:anyio \
		--ignore=tests/parity --ignore=tests/fuzz $(ARGS)

mutants: $(VENV)/.test  ## plant the faults listed in tests/mutants one at a time; each must make its test fail
	PYTHONPATH=tests $(VENV)/bin/python -m mutants.plant $(ARGS)

mutants-some: override ARGS += --some
mutants-some: mutants  ## a tenth of them, another one every day

mutants-parity: $(PARITY_VENV)/.done  ## the same for what only runs beside PyTorch and diffusers
	PYTHONPATH=tests $(PARITY_VENV)/bin/python -m mutants.plant --beside-torch $(ARGS)

mutants-parity-some: override ARGS += --some --parts 20
mutants-parity-some: mutants-parity  ## a twentieth of these

fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(PARITY_VENV)/.done  ## look for calls that go wrong, at random, on both frameworks: make fuzz MINUTES=30
	$(PARITY_VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/fuzz --fuzz-minutes $(MINUTES) --timeout $(FUZZ_TIMEOUT) $(ARGS)

parity: $(PARITY_VENV)/.done  ## compare with diffusers and transformers, live, and run the tests that need torch
	$(PARITY_VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder tests -m "torch or parity" --ignore=tests/fuzz $(ARGS)

interop: $(INTEROP_VENV)/.done  ## hook models of the real ppdiffusers; its environment is large: 157 packages, 2.4 GB
	$(INTEROP_VENV)/bin/python -m pytest tests/interop -m interop $(ARGS)

eval-demo: export OMP_NUM_THREADS ?= 2
eval-demo: $(VENV)/.cpu  ## what low bit costs the small model: 8 prompts, 4 precisions, a report; goes on where it was stopped
	@echo "About 11 minutes on two free cores, 20 or more beside other work on them; below, each line says how much is left."
	test -f outputs/eval/layers.npz || $(VENV)/bin/lowbit-video eval layers --steps 8 --local-shares \
		--prompt "a green ring gets smaller on a cyan background" --out outputs/eval/layers.npz
	$(VENV)/bin/lowbit-video eval compare --prompts eval/prompts/small_world.txt --steps 8 --out outputs/eval \
		--speed eval/speed/results/kernels.json --speed-shape CogVideoX-2b $(ARGS)

gpu-test: $(VENV)/.test  ## the tests that need an NVIDIA GPU, with the framework that LOWBIT_TEST_FRAMEWORK names
	$(VENV)/bin/python -m pytest tests/gpu $(ARGS)

# The newest diffusers whose dispatcher is known, beside the one that the parity environment has.
NEWEST_DIFFUSERS ?= diffusers==0.42.1

parity-newest: $(PARITY_VENV)/.done  ## the tests of diffusers' dispatcher with the newest diffusers
	$(PARITY_VENV)/bin/pip install -q --upgrade --no-deps --target .site/newest '$(NEWEST_DIFFUSERS)'
	PYTHONPATH=.site/newest $(PARITY_VENV)/bin/python -m pytest tests/lowbit_video/hook/dispatcher $(ARGS)

.tritons/%/.done:
	rm -rf $(@D)
	$(PYTHON) -m pip install -q --no-deps --target $(@D) triton==$*
	touch $@

triton-matrix: $(VENV)/.test $(TRITONS:%=.tritons/%/.done)  ## every variant under each Triton: is it compiled, are its launches repeated right (286 MB each)
	for version in $(TRITONS); do TRITON_CACHE_DIR=.tritons/cache-$$version PYTHONPATH=.tritons/$$version:tests \
		$(VENV)/bin/python tests/kernels/triton_matrix.py --record || failed=1; \
		TRITON_CACHE_DIR=.tritons/cache-$$version PYTHONPATH=.tritons/$$version LOWBIT_TEST_LAUNCHES=all \
		$(VENV)/bin/python -m pytest -q tests/kernels/test_compiled.py || failed=1; done; test -z "$$failed"

NEWEST_TRITON = $(lastword $(TRITONS))

triton-newest: $(VENV)/.test .tritons/$(NEWEST_TRITON)/.done  ## the same under the newest of them alone, without changing what is recorded
	TRITON_CACHE_DIR=.tritons/cache-$(NEWEST_TRITON) PYTHONPATH=.tritons/$(NEWEST_TRITON):tests \
		$(VENV)/bin/python tests/kernels/triton_matrix.py

shipped: $(VENV)/.test  ## compile the kernels that are shipped compiled, with the Triton that they are measured under
	$(VENV)/bin/python -m lowbit_video.kernels.shipped.build $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .

wheel: $(VENV)/.test  ## build the wheel, install it into an empty environment, import it there
	rm -rf dist .venv-wheel
	$(VENV)/bin/python -m build -q --wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q dist/*.whl
	cd /tmp && $(CURDIR)/.venv-wheel/bin/python -c 'import lowbit_video, lowbit_video.kernels.variants as v; print("imported", lowbit_video.__version__, "with", len(v.VARIANTS), "kernel variants")'
	cd /tmp && $(CURDIR)/.venv-wheel/bin/lowbit-video kernels
	rm -rf .venv-wheel

release-check: $(VENV)/.test  ## sdist and wheel, each used outside of a checkout on the oldest and newest Python at hand (PYTHONS: others)
	$(VENV)/bin/pip install -q -e '.[cpu,eval,test,release]'
	$(VENV)/bin/python tests/packaging/release_check.py $(PYTHONS)

clean:
	rm -rf .venv .venv-parity .venv-interop .venv-wheel .tritons .site build dist outputs *.egg-info
