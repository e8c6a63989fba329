#!/usr/bin/env bash
# Make the environment, then lint, type-check and test everything; the last line is pytest's.
#
#     bash tests/run.sh [PYTEST ARGUMENTS]
set -uo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

check() {
    local start=$SECONDS
    if ! python -c "import $2" 2>/dev/null; then
        echo "== $1: not run, this environment has no $2"
    elif python -m "${@:2}"; then
        echo "== $1: passed in $((SECONDS - start)) s"
    else
        failed+=("$1")
        echo "== $1: FAILED"
    fi
}

check "lint" ruff check --quiet .
check "format" ruff format --check --quiet .
check "types" mypy
python -m pytest "$@" || failed+=("tests")
[ ${#failed[@]} -eq 0 ]
