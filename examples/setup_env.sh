#!/usr/bin/env bash
# The environment that every script here runs in: PyTorch, the pinned packages and the compiled kernels, in .venv.
#
#     bash examples/setup_env.sh        make it, or bring it up to date; nothing to do takes a fraction of a second
#     . examples/setup_env.sh           the same, then activate it
#
# Without a GPU it takes PyTorch's CPU build. With one, and an active Python whose torch sees it, that torch is used.
#
#     KLEAR_VENV=folder     where the environment lies (.venv beside this repository's README); "none" takes the active
#                           Python as it is and installs nothing, for containers that bring the packages
#     KLEAR_PYTHON=python   the interpreter to make it with, 3.11 or 3.12 (python3.11, else python3.12)
#     KLEAR_TORCH_INDEX=URL package index to take PyTorch's CPU build from, where pip's own does not have it
#     KLEAR_CUDA=0|1        compile the kernels without or with their CUDA part (with it where there are a GPU and nvcc)

KLEAR_SETUP="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/setup_env.sh"
if [ "${BASH_SOURCE[0]}" != "$0" ]; then
    # A child does the work, so that an error leaves the shell that sources this alone.
    bash "$KLEAR_SETUP" || return 1
    if [ "${KLEAR_VENV:-}" = none ]; then return 0; fi
    . "${KLEAR_VENV:-$(dirname "$(dirname "$KLEAR_SETUP")")/.venv}/bin/activate"
    return
fi

set -euo pipefail
ROOT="$(dirname "$(dirname "$KLEAR_SETUP")")"
VENV="${KLEAR_VENV:-$ROOT/.venv}"
VENV_PYTHON="$VENV/bin/python"
STAMP="$VENV/klear-stamp"
TORCH="$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_REQUIRE_VIRTUALENV=0

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

if [ "${KLEAR_VENV:-}" = none ]; then
    python -c 'import torch, pydantic, transformers' || fail "KLEAR_VENV=none, and the active python lacks packages (above)"
    exit 0
fi

gpu_present() { nvidia-smi -L >/dev/null 2>&1; }

# 3.11 or 3.12, and startable: a pyenv shim of a version that is not chosen is on the PATH and fails.
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

sees_gpu() { supported "$1" && "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

# Everything that the environment is made from, in one number.
fingerprint() {
    {
        echo "$ROOT $KLEAR_CUDA ${KLEAR_CUDA_ARCHS:-}"
        cd "$ROOT"
        find constraints.txt pyproject.toml setup.py csrc -type f | LC_ALL=C sort | xargs cksum
    } | cksum
}

up_to_date() {
    [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ] && compgen -G "$ROOT/megatron_klear/kernels/_policy_loss*.so" \
        >/dev/null && "$VENV_PYTHON" -c '' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${KLEAR_PYTHON:-}" ]; then
        supported "$KLEAR_PYTHON" || fail "KLEAR_PYTHON=$KLEAR_PYTHON does not start, or is not Python 3.11 or 3.12"
        echo "$KLEAR_PYTHON"
        return
    fi
    for candidate in python python3; do
        if gpu_present && sees_gpu "$candidate"; then echo "$candidate"; return; fi
    done
    for candidate in python3.11 python3.12 python3 python; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    fail "needs Python 3.11 or 3.12 on the PATH (or in KLEAR_PYTHON); found neither"
}

make_venv() {
    local python
    python="$(find_python)" || exit 1
    if [ -d "$VENV" ] && [ -n "$(ls -A "$VENV")" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
        fail "$VENV exists and is not a virtual environment; move it away or set KLEAR_VENV to another folder"
    fi
    say "$("$python" --version) -> $VENV"
    "$python" -m venv "$VENV" >&2 || fail "cannot make $VENV; on Debian and Ubuntu: apt-get install python3-venv"
    if gpu_present && sees_gpu "$python"; then
        say "using the torch of $("$python" -c 'import sys; print(sys.prefix)'), which sees a GPU"
        # Not --system-site-packages, which would skip the packages of an active virtual environment.
        "$python" -c 'import sys; print(*[p for p in sys.path if p.endswith(("site-packages", "dist-packages"))], sep="\n")' \
            >"$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/klear-base.pth"
    fi
}

check_compiler() {
    local header
    command -v "${CXX:-g++}" >/dev/null || fail "the kernels need a C++ compiler: install g++, or name one in CXX"
    header="$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
    [ -f "$header" ] || fail "the kernels need $header; on Debian and Ubuntu: apt-get install python3-dev"
}

pip_install() { "$VENV_PYTHON" -m pip install -qq "$@" >&2; }

# First and alone: as another package's dependency it would bring the CUDA libraries to machines without a GPU.
install_torch() {
    if "$VENV_PYTHON" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then return; fi
    if gpu_present || [ "$(uname)" != Linux ]; then
        say "installing torch $TORCH"
        pip_install -c "$ROOT/constraints.txt" "torch==$TORCH" || fail "cannot install torch $TORCH (pip's words above)"
        return
    fi
    say "installing torch $TORCH, its CPU build"
    pip_install -c "$ROOT/constraints.txt" "torch==$TORCH+cpu" ${KLEAR_TORCH_INDEX:+--index-url "$KLEAR_TORCH_INDEX"} \
        2>/dev/null && return
    say "pip knows no CPU build of torch $TORCH; taking its default build, which may bring CUDA libraries of several GB" \
        "(KLEAR_TORCH_INDEX=URL names the package index of PyTorch's CPU builds)"
    pip_install -c "$ROOT/constraints.txt" "torch==$TORCH" || fail "cannot install torch $TORCH (pip's words above)"
}

install_package() {
    local constraints="$VENV/klear-constraints.txt"
    # A torch that was there before is not held to the pinned version.
    grep -v '^torch==' "$ROOT/constraints.txt" >"$constraints"
    say "installing the pinned packages and compiling the kernels"
    pip_install -c "$constraints" 'setuptools>=77' wheel 'pybind11>=3.0' ||
        fail "cannot install setuptools, wheel and pybind11 (pip's words above)"
    pip_install -c "$constraints" --no-build-isolation -e "$ROOT[dev,gguf]" ||
        fail "cannot install this package (pip's words above)"
}

# Left empty with a GPU: setup.py then compiles the CUDA part where it finds nvcc.
if [ -z "${KLEAR_CUDA:-}" ] && ! gpu_present; then KLEAR_CUDA=0; fi
export KLEAR_CUDA="${KLEAR_CUDA:-}"
if up_to_date; then exit 0; fi
SECONDS=0
mkdir -p "$(dirname "$VENV")"
if command -v flock >/dev/null; then
    exec 9>"$VENV.lock"
    flock 9
    if up_to_date; then exit 0; fi
fi
"$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
check_compiler
install_torch
install_package
"$VENV_PYTHON" -c 'import torch, megatron_klear.kernels._policy_loss' || fail "installed, but it cannot be imported (above)"
fingerprint >"$STAMP"
say "ready after $SECONDS seconds"
