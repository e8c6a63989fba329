#!/usr/bin/env bash
# Every check: environment, ruff, mypy, pytest. Ends at the first that fails; pytest's summary is the last line.
#
#     bash tests/run.sh                       all tests, the slow ones last
#     bash tests/run.sh -m 'not slow'         anything given goes to pytest
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
phase "ruff check" ruff check --quiet .
phase "ruff format" ruff format --quiet --check .
phase "mypy" mypy
exec python -m pytest --durations 10 --durations-min 5 "$@"
