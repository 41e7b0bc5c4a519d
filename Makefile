# make demo: set up, then the main job on the embedded model.   make test: set up, then all tests.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(wildcard nbs/*.ipynb nbs/tutorials/*.ipynb)
export PIP_REQUIRE_VIRTUALENV = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lab export run clean fixtures persona-tiny eval-persona-tiny ship-persona-tiny variants bench-extraction bench-generation bench-steering bench-server interop-peers interop-llamacpp prove-vllm docs help

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

.venv/ready: settings.ini setup.py constraints.txt
	@echo "setting up .venv (a minute or two, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/ready  ## answers, vectors, pictures and steering on the embedded model
	@$(BIN)/persona-steer demo

test: .venv/ready  ## notebooks under nbval, pytest, ruff
	@$(BIN)/ruff check
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg tests nbs

lab: .venv/ready  ## JupyterLab on the tutorials
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/tutorials/01_quickstart.ipynb

export: .venv/ready  ## notebooks -> persona_vectors/*.py, and index.ipynb -> README.md
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tools/readme.py

run: .venv/ready  ## execute notebooks in place: make run NOTEBOOKS=nbs/12_plots.ipynb
	@$(BIN)/python tools/run_notebooks.py $(NOTEBOOKS)

fixtures: .venv/ready  ## responses and expected vectors of the tests, from the embedded model
	@$(BIN)/python tests/make_fixtures.py

persona-tiny: .venv/ready  ## train the embedded model (about 40 minutes on 2 cores)
	@cd experiments/000_persona_tiny && MALLOC_MMAP_THRESHOLD_=10000000000 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=1000000000 ../../$(BIN)/python train.py

eval-persona-tiny: .venv/ready  ## every figure of its model card
	@cd experiments/000_persona_tiny && ../../$(BIN)/python evaluate.py --model build/persona-tiny

ship-persona-tiny: .venv/ready  ## put a newly trained model into the package, with card and fixtures (SHIP=--accept-missed)
	@$(BIN)/python experiments/000_persona_tiny/ship.py $(SHIP)
	@$(MAKE) fixtures

variants: .venv/ready  ## base model, fine-tunes and checkpoints of the embedded model, under data/models/
	@cd experiments/000_persona_tiny && ../../$(BIN)/python variants.py

bench-extraction: .venv/ready  ## extraction beside its peers and the limit (about 40 minutes on 2 cores, alone)
	@$(BIN)/pip install -q --no-deps --target experiments/bench_extraction/build/peers -r experiments/bench_extraction/peers.txt
	@cd experiments/bench_extraction && PYTHONPATH=build/peers ../../$(BIN)/python bench.py && PYTHONPATH=build/peers ../../$(BIN)/python growth.py

bench-generation: .venv/ready  ## generation beside a plain loop and continuous batching (about 10 minutes on 2 cores, alone)
	@cd experiments/bench_generation && ../../$(BIN)/python bench.py

bench-steering: .venv/ready  ## what steering adds to a token, beside a bare hook and its peers (about 10 minutes on 2 cores, alone)
	@$(BIN)/pip install -q --no-deps --target experiments/bench_steering/build/peers -r experiments/bench_steering/peers.txt
	@cd experiments/bench_steering && PYTHONPATH=build/peers ../../$(BIN)/python bench.py

bench-server: .venv/ready  ## a server of steered personas: together beside one after the other, and 200 clients for a minute
	@cd experiments/bench_server && ../../$(BIN)/python bench.py && ../../$(BIN)/python load.py

interop-peers: .venv/ready  ## the same numbers from repeng, steering-vectors and us
	@$(BIN)/pip install -q --no-deps --target experiments/interop_peers/build/peers -r experiments/interop_peers/peers.txt
	@cd experiments/interop_peers && PYTHONPATH=build/peers ../../$(BIN)/python parity.py

LLAMA := experiments/interop_llamacpp/build
$(LLAMA)/ready:
	@mkdir -p $(LLAMA)/sdist $(LLAMA)/source && $(PYTHON) -m venv $(LLAMA)/venv
	@$(LLAMA)/venv/bin/pip install -q -c constraints.txt -e '.[gguf]' sentencepiece jinja2
	@$(LLAMA)/venv/bin/pip download -q --no-deps --no-binary :all: -d $(LLAMA)/sdist llama-cpp-python==0.3.36
	@tar xzf $(LLAMA)/sdist/*.tar.gz -C $(LLAMA)/source --strip-components=1
	@CMAKE_BUILD_PARALLEL_LEVEL=1 $(LLAMA)/venv/bin/pip install -q $(LLAMA)/source
	@cmake -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA)/llama -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	@cmake --build $(LLAMA)/llama --target llama-server && touch $@

interop-llamacpp: $(LLAMA)/ready  ## control vectors and baked models in llama.cpp itself (builds it once, about 25 minutes)
	@cd experiments/interop_llamacpp && build/venv/bin/python run.py --source build/source/vendor/llama.cpp --server build/llama/bin/llama-server

prove-vllm: .venv/ready  ## our checkpoints in vLLM itself (3.4 GB once, then about 25 minutes on 2 cores)
	@cd experiments/interop_vllm && ../../$(BIN)/python prove.py

docs: .venv/ready  ## tutorials and API reference as a site in _docs/, offline
	@$(BIN)/python tools/docs.py

clean:  ## remove what was built
	rm -rf .venv build dist _docs *.egg-info .pytest_cache .ruff_cache
