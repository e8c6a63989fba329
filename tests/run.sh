#!/usr/bin/env bash
# Every check: environment, ruff, mypy, pytest. Ends at the first that fails; pytest's summary is the last line.
#
#     bash tests/run.sh                       all tests
#     bash tests/run.sh -m 'not slow'         anything given goes to pytest
#     KLEAR_TEST_WORKERS=0 bash tests/run.sh  one test at a time (as many as cores otherwise, up to 4)
#
# Tests of vLLM run where `bash tools/make_vllm_env.sh --cpu vllm-env` has made its environment, or KLEAR_VLLM_PYTHON
# names the Python of another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. examples/setup_env.sh

phase() {
    local name="$1" start=$SECONDS
    shift
    if ! "$@"; then
        echo "$name failed: $*" >&2
        exit 1
    fi
    echo "$name: $((SECONDS - start)) s"
}

export KLEAR_VLLM_PYTHON="${KLEAR_VLLM_PYTHON:-$PWD/vllm-env/bin/python}"
# One thread a process: tests of several ranks fill the cores themselves.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Half of the tests keep one core busy. A worker may need 4 GiB, and the tests of a GPU want it for themselves.
cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)))')"
workers=$((cores < 4 ? cores : 4))
if nvidia-smi -L >/dev/null 2>&1; then workers=0; fi
phase "ruff check" ruff check --quiet .
phase "ruff format" ruff format --quiet --check .
phase "mypy" mypy
exec python -m pytest -n "${KLEAR_TEST_WORKERS:-$workers}" --durations 10 --durations-min 5 "$@"
