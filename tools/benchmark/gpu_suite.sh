#!/usr/bin/env bash
# The whole GPU suite on one machine with one CUDA device and nvcc, without network: build, tests, sanitizer, benchmarks.
#
#   bash tools/benchmark/gpu_suite.sh
#
# Environment: PYTHON (python3), OUT (tools/benchmark/results) for JSON, junit and the log, SIZES (4k 8k 32k),
# KLEAR_CUDA_ARCHS (this device's alone), SANITIZE=0 to leave compute-sanitizer out.
# Every step runs whatever became of the ones before; the exit code is the number of steps that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-tools/benchmark/results}" && cd "${OUT:-tools/benchmark/results}" && pwd)
export OUT PYTHONUNBUFFERED=1 KLEAR_CUDA=1
export KLEAR_VENV=none # PYTHON is what is to be measured
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
: >"$OUT/gpu_suite.log"
failed=0

step() {
    local name=$1 start=$SECONDS code
    shift
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$OUT/gpu_suite.log"
    "$@" 2>&1 | tee -a "$OUT/gpu_suite.log"
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then failed=$((failed + 1)); fi
    printf '== %s: exit %s after %s s\n' "$name" "$code" "$((SECONDS - start))" | tee -a "$OUT/gpu_suite.log"
}

if [ -z "${KLEAR_CUDA_ARCHS:-}" ]; then
    KLEAR_CUDA_ARCHS=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major in (9, 10) else ""))') || { echo "torch sees no CUDA device"; exit 1; }
fi
export KLEAR_CUDA_ARCHS

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
    for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tools/benchmark/policy_loss.py \
            --sizes tiny --only ours --repeats 1 --out "$OUT/policy_loss_$tool.json"
    done
fi
# shellcheck disable=SC2086
step benchmark "$PYTHON" tools/benchmark/policy_loss.py --sizes ${SIZES:-4k 8k 32k}
if "$PYTHON" -c 'import megatron.core, transformers, pydantic' 2>/dev/null; then
    PYTORCH_ALLOC_CONF=expandable_segments:True step sft "$PYTHON" tools/benchmark/sft.py --out "$OUT/sft_cuda.json"
fi
printf '\n%s steps failed; results in %s\n' "$failed" "$OUT" | tee -a "$OUT/gpu_suite.log"
exit "$failed"
