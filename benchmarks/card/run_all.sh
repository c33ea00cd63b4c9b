#!/usr/bin/env bash
# Everything that needs a card, on a bare machine: Python with torch, no internet. One command ends within LIMIT seconds.
#
#   here, once:     python benchmarks/card/pack.py
#   there, by part: benchmarks/card/run_all.sh stash          with .cache/card/kit.NN (and kit.sums) carried along
#   there, then:    benchmarks/card/run_all.sh setup look tests-first rates fp16 ...
#
# Words after the command are steps; each ends within its own limit and can be run again: what is done is not repeated.
# Without any: all of them. KIT keeps what was stashed and installed, RESULTS what was measured; both are outside of the
# tree, which the next command may replace. OUT gets a copy of the results and logs at the end of every command.
set -u
cd "$(dirname "$0")/../.."
KIT=${KIT:-/tmp/sardonyx-kit}
RESULTS=${RESULTS:-$KIT/results}
OUT=${OUT:-$RESULTS/out}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-560} # seconds of the whole command
REHEARSAL=${REHEARSAL:-} # not empty: tiny, and without a card
mkdir -p "$KIT" "$RESULTS" "$OUT"
# What python3 finds without us is where torch is, whichever environment that may be.
TORCH_PYTHON=${TORCH_PYTHON:-$PYTHON}
# The tree comes before the wheel that was packed from it: what was mended since is what runs.
export PYTHONPATH="$PWD/server:$PWD/export:$KIT/site:$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SARDONYX_REHEARSAL="$REHEARSAL"
tell_commit() { # the copy of the tree may have no git
    [ ! -f "$KIT/kit.json" ] || export SARDONYX_COMMIT="$($PYTHON -c "import json; print(json.load(open('$KIT/kit.json'))['commit'])")"
}
tell_commit
# CUDA's libraries, where they came as wheels: ONNX Runtime looks for them beside itself, and it is not beside them here.
NVIDIA=$($PYTHON -c "import importlib.util as u; s = u.find_spec('nvidia'); print(next(iter(s.submodule_search_locations), '') if s else '')")
if [ -d "$NVIDIA" ] && [ "$NVIDIA" != "$KIT/site/nvidia" ]; then
    LD_LIBRARY_PATH=$(find -L "$NVIDIA" -maxdepth 3 -type d -name lib | paste -sd:)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH
fi
failed=0

left() { echo $((LIMIT - SECONDS > 20 ? LIMIT - SECONDS : 20)); }

say() { echo "== $1 (at $SECONDS s)"; }

stash() { # keep the parts that came with this command
    cp -v .cache/card/kit.* "$KIT/"
}

setup() { # join the parts, check them, install the wheels beside torch; nothing is fetched
    [ -f "$KIT/installed" ] && return 0
    (cd "$KIT" && grep -v kit.tar kit.sums | sha256sum --quiet -c - && cat kit.[0-9]* >kit.tar && sha256sum -c <(grep kit.tar kit.sums)) || return 1
    tar -xf "$KIT/kit.tar" -C "$KIT" && rm "$KIT/kit.tar" || return 1
    $PYTHON -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$KIT/site" \
        "$KIT"/wheels/*.whl || return 1
    touch "$KIT/installed"
    tell_commit
}

look() { # what is there: card, libraries, execution providers, memory
    nvidia-smi
    df -h / /dev/shm "$KIT"
    free -g
    $PYTHON - <<'PY'
import importlib.metadata as metadata, os, sys
print(sys.version, os.cpu_count(), "cores")
for name in ("sardonyx", "onnxruntime-gpu", "numpy", "torch", "transformers", "diffusers", "protobuf", "grpcio"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "absent")
import onnxruntime
print("onnxruntime", onnxruntime.__version__, onnxruntime.__file__, onnxruntime.get_available_providers())
if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
    onnxruntime.preload_dlls()
    onnxruntime.print_debug_info()
from sardonyx.runtime.providers import num_gpus
print("cards:", num_gpus())
if num_gpus():
    from sardonyx.runtime.device_memory import measure_device
    print(measure_device(0))
PY
}

run_tests() { # name, then pytest's arguments
    local name=$1
    shift
    timeout "$(left)" $PYTHON -m pytest -m gpu -W default -p no:cacheprovider --timeout 300 -o addopts="-ra --import-mode=importlib" \
        --junitxml "$RESULTS/tests-$name.xml" "$@" >"$RESULTS/tests-$name.txt" 2>&1
    local code=$?
    tail -n 60 "$RESULTS/tests-$name.txt"
    return $code
}

bench() { # a stage of benchmarks/gpu.py
    # A rival is stopped first, so that it does not outlive what started it and keep the card.
    local options=(--out "$RESULTS" --torch-python "$TORCH_PYTHON" --seconds "$(($(left) - 10))")
    [ -f "$KIT/smollm2.gguf" ] && options+=(--gguf "$KIT/smollm2.gguf")
    [ -n "$REHEARSAL" ] && options+=(--rehearsal --work "$KIT/work")
    timeout "$(left)" $PYTHON benchmarks/gpu.py "$1" "${options[@]}" >"$RESULTS/bench-$1.txt" 2>&1
    local code=$?
    tail -n 40 "$RESULTS/bench-$1.txt"
    return $code
}

step() {
    say "$1"
    case $1 in
    stash | setup | look) $1 ;;
    tests-first) run_tests first tests/gpu/test_device.py tests/gpu/test_sampling.py tests/gpu/test_language_models.py -k "not smollm2" ;;
    tests-more) run_tests more tests/gpu/test_memory.py tests/gpu/test_families.py tests/gpu/test_speech.py tests/gpu/test_tensorrt.py ;;
    tests-smollm2) run_tests smollm2 tests/gpu/test_language_models.py -k smollm2 ;;
    *) bench "$1" ;;
    esac
}

[ $# -eq 0 ] && set -- setup look tests-first rates fp16 rival int4 tests-more http tests-smollm2 families compiled
for each in "$@"; do
    if [ $SECONDS -gt $((LIMIT - 30)) ]; then
        echo "== no time left for $each: run it again"
        failed=1
        break
    fi
    step "$each" || { echo "== $each ended with $?"; failed=1; }
done
# Few files come back: one with all numbers, one with all logs.
$PYTHON - "$RESULTS" "$OUT" <<'PY'
import json, pathlib, sys, tarfile
results, out = map(pathlib.Path, sys.argv[1:])
found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("gpu-*.json"))}
(out / "gpu.json").write_text(json.dumps(found, indent=1))
with tarfile.open(out / "logs.tar.gz", "w:gz") as tar:
    for path in sorted(results.iterdir()):
        if path.suffix in (".txt", ".log", ".xml"):
            tar.add(path, arcname=path.name)
PY
exit $failed
