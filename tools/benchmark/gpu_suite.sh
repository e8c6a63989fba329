#!/usr/bin/env bash
# The whole GPU suite on one machine with one CUDA device and nvcc, without network: build, tests, sanitizers, benchmarks,
# a run of SFT and GPPO, and one table of the figures beside their goals.
#
#   bash tools/benchmark/gpu_suite.sh
#
# Cut off, it goes on with the next start: what passed with these sources on this device is not repeated (FRESH=1 repeats
# all). Results lie in build/gpu_suite/ meanwhile and are copied to OUT after every step.
#
# Environment: PYTHON (python3), OUT (tools/benchmark/results) for JSON, junit, table and log, SIZES (4k 8k 32k),
# KLEAR_CUDA_ARCHS (this device's alone), SANITIZE=0 to leave compute-sanitizer out, FRESH=1.
# Every step runs whatever became of the ones before; the exit code is the number of steps that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
RESULTS=$(mkdir -p "${OUT:-tools/benchmark/results}" && cd "${OUT:-tools/benchmark/results}" && pwd)
export PYTHONUNBUFFERED=1 KLEAR_CUDA=1
export KLEAR_VENV=none # PYTHON is what is to be measured
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

device=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
arch = f"{major}{minor}" + ("a" if major in (9, 10) else "")
print(arch, torch.cuda.get_device_name().replace(" ", "_"))') || { echo "torch sees no CUDA device"; exit 1; }
export KLEAR_CUDA_ARCHS=${KLEAR_CUDA_ARCHS:-${device%% *}}
sources=$(find csrc megatron_klear tests tools -type f \( -name '*.py' -o -name '*.cu*' -o -name '*.cpp' -o -name '*.h' \
    -o -name '*.inl' -o -name '*.sh' \) -print0 | sort -z | xargs -0 cat | cksum | cut -d ' ' -f 1)
OUT="$PWD/build/gpu_suite/${device#* }-$sources"
if [ "${FRESH:-0}" = 1 ]; then rm -rf "$OUT"; fi
mkdir -p "$OUT/done"
export OUT
failed=0

keep() { find "$OUT" -maxdepth 1 -type f -exec cp {} "$RESULTS" \;; }

step() {
    local name=$1 start=$SECONDS code
    shift
    if [ -e "$OUT/done/$name" ]; then
        printf '\n== %s: passed before\n' "$name" | tee -a "$OUT/gpu_suite.log"
        return
    fi
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$OUT/gpu_suite.log"
    "$@" 2>&1 | tee -a "$OUT/gpu_suite.log"
    code=${PIPESTATUS[0]}
    if [ "$code" -eq 0 ]; then : >"$OUT/done/$name"; else failed=$((failed + 1)); fi
    printf '== %s: exit %s after %s s\n' "$name" "$code" "$((SECONDS - start))" | tee -a "$OUT/gpu_suite.log"
    keep
}

step device nvidia-smi
step build "$PYTHON" setup.py build_ext --inplace
step available "$PYTHON" -c 'from megatron_klear.kernels import available; print(available()); assert available().cuda_archs'
tests=tests/kernels
if "$PYTHON" -c 'import megatron.core, transformers, hypothesis, aiohttp' 2>/dev/null; then
    tests=tests
elif "$PYTHON" -c 'import megatron.core, transformers, hypothesis' 2>/dev/null; then
    tests="tests/kernels tests/distributed/test_gpu_engine.py"
    echo "aiohttp is not installed: the tests of weight transfer between GPUs are left out" | tee -a "$OUT/gpu_suite.log"
fi
# the options of pyproject.toml name plugins that a bare GPU machine may lack
# shellcheck disable=SC2086
step tests "$PYTHON" -m pytest -o addopts= -p no:cacheprovider -ra -m gpu $tests --junitxml "$OUT/gpu_tests.xml"
if [ "${SANITIZE:-1}" = 1 ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tools/benchmark/policy_loss.py \
            --sizes tiny --only ours --repeats 1 --out "$OUT/policy_loss_$tool.json"
    done
fi
# One file a size, so that one that was cut off costs itself alone.
for size in ${SIZES:-4k 8k 32k}; do
    step "policy_loss_$size" "$PYTHON" tools/benchmark/policy_loss.py --sizes "$size" --out "$OUT/policy_loss_cuda_$size.json"
done
if "$PYTHON" -c 'import megatron.core, transformers, pydantic' 2>/dev/null; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
    for case in qwen3_0.6b_16k qwen3_0.6b_32k qwen3_0.6b_64k qwen3_0.6b_16k_whole qwen3_0.6b_64k_whole; do
        step "sft_$case" "$PYTHON" tools/benchmark/sft.py --case "$case" --out "$OUT/sft_cuda_$case.json"
    done
    for case in qwen3_4b_16k qwen3_4b_32k qwen3_4b_64k; do
        step "sft_$case" "$PYTHON" tools/benchmark/sft.py --case "$case" --only engine --repeats 2 \
            --out "$OUT/sft_cuda_$case.json"
    done
    step rollouts "$PYTHON" tools/benchmark/rollouts.py --device cuda --out "$OUT/rollouts_cuda.json"
    step quickstart bash examples/quickstart.sh --device cuda # SFT, GPPO with the local engine, evaluation
    if [ -e "$OUT/done/quickstart" ]; then cp runs/quickstart/summary.json "$OUT/quickstart_cuda.json"; fi
else
    echo "megatron-core, transformers or pydantic is not installed: SFT, rollouts and GPPO are left out" | tee -a "$OUT/gpu_suite.log"
fi
"$PYTHON" tools/benchmark/gpu_table.py "$OUT" | tee "$OUT/gpu_table.md"
keep
printf '\n%s steps failed; results in %s\n' "$failed" "$RESULTS" | tee -a "$OUT/gpu_suite.log"
exit "$failed"
