#!/usr/bin/env bash
# transformer-engine's Python, for the tests that run it with an emulated CUDA extension: the wheel of each version named
# (2.4.0 and 2.20.2, the oldest allowed and the newest tried, where none is), a folder each, without what it depends on.
#
#     bash tests/te/fetch_packages.sh [VERSION ...]
#
# Under KLEAR_TE_PACKAGES, or $XDG_CACHE_HOME/megatron_klear/te (~/.cache). What is there is left as it is.
set -euo pipefail
packages="${KLEAR_TE_PACKAGES:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron_klear/te}"
python="${KLEAR_VENV:-.venv}/bin/python"
[ -x "$python" ] || python=python3  # before there is an environment; what is fetched is of any Python
mkdir -p "$packages"
for version in "${@:-2.4.0 2.20.2}"; do
    for one in $version; do
        [ ! -d "$packages/$one" ] || continue
        fresh="$(mktemp -d "$packages/.$one.XXXXXX")"
        "$python" -m pip install --quiet --no-deps --target "$fresh" "transformer-engine==$one"
        chmod 755 "$fresh"
        mv -T "$fresh" "$packages/$one" || rm -rf "$fresh"
    done
done
