# Sourced from the repository root by examples/quickstart.sh, tests/run.sh and .ci/run: puts a `python` that can run
# this project first on the PATH.
#
# An active environment whose torch sees a GPU is used as it is, with what is missing added. Otherwise a virtual
# environment is made, once: torch first and alone, so that nothing else decides its build, then the project with the
# versions of constraints.txt. Nothing is downloaded when everything is there.
#
#   KLEAR_VENV     the virtual environment, .venv by default
#   KLEAR_PYTHON   the interpreter it is made with, by default the first of python3.11, python3.12, python3 that fits
#   KLEAR_CUDA     0 leaves the CUDA part of the extension out, 1 insists on it (see setup.py)

klear_fail() {
    echo "error: $*" >&2
    exit 1
}

klear_hash() {
    cat "$@" | sha256sum | cut -c1-16
}

klear_interpreter() {
    local candidate
    for candidate in ${KLEAR_PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    klear_fail "no Python 3.11 or 3.12 with venv among ${KLEAR_PYTHON:-python3.11 python3.12 python3}; install one or set KLEAR_PYTHON"
}

klear_pip() {
    python -m pip install -qq --disable-pip-version-check --no-input "$@"
}

# The extension is compiled by `pip install -e .`; afterwards only again when its sources change.
klear_build_extension() {
    local key stamp=build/extension.key
    key=$(klear_hash setup.py csrc/*)-${KLEAR_CUDA:-}-$(python -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')
    if [ "${1:-}" != built ] && { [ "$(cat $stamp 2>/dev/null)" != "$key" ] || ! compgen -G 'megatron_klear/_policy_loss*.so' >/dev/null; }; then
        echo "compiling csrc/"
        python setup.py --quiet build_ext --inplace || klear_fail "csrc/ does not compile; the compiler's words are above"
    fi
    mkdir -p build
    echo "$key" >$stamp
}

klear_use_active() {
    command -v python >/dev/null || python() { python3 "$@"; }
    echo "using the active environment: $(python -c 'import sys, torch; print(f"{sys.prefix}, torch {torch.__version__}, {torch.cuda.get_device_name()}")')"
    if python tools/doctor.py --dependencies >/dev/null; then
        klear_build_extension
    else
        klear_pip --no-build-isolation -e '.[dev]' || klear_fail "pip cannot add what the active environment lacks: python tools/doctor.py --dependencies"
        klear_build_extension built
    fi
}

klear_use_venv() {
    local venv=${KLEAR_VENV:-$PWD/.venv} key
    key="$(klear_hash constraints.txt pyproject.toml) $PWD"
    if [ ! -x "$venv/bin/python" ]; then
        echo "making the virtual environment $venv"
        "$(klear_interpreter)" -m venv "$venv" || klear_fail "cannot make $venv"
    fi
    PATH="$venv/bin:$PATH"
    export PATH VIRTUAL_ENV="$venv"
    hash -r
    if [ "$(cat "$venv/klear.key" 2>/dev/null)" = "$key" ]; then
        klear_build_extension
        return
    fi
    echo "installing torch, the dependencies and the project (a few minutes the first time)"
    klear_pip "$(grep '^torch==' constraints.txt)" || klear_fail "pip cannot install torch; see its message above"
    klear_pip -c constraints.txt setuptools pybind11 || klear_fail "pip cannot install the build tools; see its message above"
    klear_pip -c constraints.txt --no-build-isolation -e '.[dev]' || klear_fail "pip cannot install the project; see its message above"
    klear_build_extension built
    echo "$key" >"$venv/klear.key"
}

[ -f tools/environment.sh ] || klear_fail "source tools/environment.sh from the repository root"
if "$(command -v python || command -v python3)" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    klear_use_active
else
    klear_use_venv
fi
