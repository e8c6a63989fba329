"""The build: every architecture compiles, no row kernel spills, and a rebuild compiles nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW_KERNELS = {"two_read_rows", "one_read_rows", "sharded_rows"}
ARCHS = {"sm_80", "sm_90a", "sm_100f", "sm_120"}

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc"
)


def build(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build into `folder`, sharing the object files of ordinary builds so that only what changed is compiled."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), *options]
    removed = {"KLEAR_CUDA", "KLEAR_CUDA_ARCHS"}
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return subprocess.run(command, cwd=ROOT, env=kept | environment, text=True, capture_output=True)


def objects() -> Path:
    """Where setuptools keeps the object files of this interpreter."""
    from setuptools.dist import Distribution

    command = Distribution().get_command_obj("build")
    command.ensure_finalized()
    return ROOT / command.build_temp


@needs_nvcc
def test_all_architectures_compile_and_no_row_kernel_spills(tmp_path: Path) -> None:
    done = build(tmp_path, KLEAR_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = set()
    for log in sorted(objects().glob("*.cu.log")):
        entry = re.compile(
            r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            re.DOTALL,
        )
        for name, arch, *bytes_of_stack in entry.findall(log.read_text()):
            seen |= {(kernel, arch) for kernel in ROW_KERNELS if kernel in name}
            assert bytes_of_stack == ["0", "0", "0"], f"{name} for {arch}: stack, spill stores, loads {bytes_of_stack}"
    assert seen >= {(kernel, arch) for kernel in ROW_KERNELS for arch in ARCHS}


@needs_nvcc
def test_a_second_build_compiles_nothing(tmp_path: Path) -> None:
    assert build(tmp_path / "first", KLEAR_CUDA="1").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in objects().glob("*.o")}
    assert build(tmp_path / "second", KLEAR_CUDA="1").returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in objects().glob("*.o")}


def test_without_cuda_it_builds_imports_and_says_what_is_missing(tmp_path: Path) -> None:
    done = build(tmp_path, KLEAR_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    program = (
        "import sys, importlib.util as u\n"
        "spec = u.spec_from_file_location('megatron_klear.kernels._policy_loss', sys.argv[1])\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert module.cuda_archs() == '' and module.cuda_devices()[0] == 0 and module.cpu_isa()\n"
        "module.cuda_combine(0, 1, 1, 0, 0, 0)\n"
    )
    library = next(tmp_path.glob("megatron_klear/kernels/_policy_loss*.so"))
    ran = subprocess.run([sys.executable, "-c", program, str(library)], text=True, capture_output=True)
    assert "built without its CUDA part" in ran.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KLEAR_CUDA": "yes"}, "KLEAR_CUDA must be 0 or 1"),
        ({"KLEAR_CUDA": "1", "PATH": "/nowhere", "CUDA_HOME": "/nowhere"}, "no nvcc on the PATH"),
        ({"KLEAR_CUDA_ARCHS": "hopper"}, "KLEAR_CUDA_ARCHS"),
    ],
)
def test_bad_build_settings_are_named(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    done = build(tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_the_environment_is_up_to_date_by_the_kernel_that_is_built() -> None:
    """examples/setup_env.sh looks for the file that setup.py makes; elsewhere it would install at every call."""
    (pattern,) = re.findall(r'compgen -G "\$ROOT/(\S+)"', (ROOT / "examples" / "setup_env.sh").read_text())
    (name,) = re.findall(r'Extension\("(\S+)"', (ROOT / "setup.py").read_text())
    assert fnmatch(name.replace(".", "/") + ".cpython-311-x86_64-linux-gnu.so", pattern)
