"""Builds csrc/ into `megatron_klear.kernels._policy_loss`; everything else about the package is in pyproject.toml.

The CPU part is always built, the CUDA part where nvcc is found. Environment:
    KLEAR_CUDA=0|1      leave the CUDA part out, or fail without nvcc
    KLEAR_CUDA_ARCHS    semicolon-separated, like TORCH_CUDA_ARCH_LIST: "80;90a;100f;120+PTX" (or "9.0a")
    MAX_JOBS            compilers at a time
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CPU_SOURCES = ["bind.cpp", "policy_loss_cpu.cpp", "cpu_scalar.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp"]
CUDA_SOURCES = ["policy_loss_cuda.cu", "cuda_two_read.cu", "cuda_one_read.cu", "cuda_sharded.cu"]
DEFAULT_ARCHS = "80;90a;100f;120+PTX"
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]


def pybind11_include() -> Path:
    """The headers of the pybind11 package, else those that ship inside torch."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = find_spec(package)
        if spec and spec.submodule_search_locations:
            include = Path(spec.submodule_search_locations[0]) / folder
            if (include / "pybind11" / "pybind11.h").is_file():
                return include
    raise SystemExit("building csrc/ needs pybind11: pip install 'pybind11>=3.0'")


def find_nvcc() -> str | None:
    """The compiler of the CUDA part, or None where that part is left out."""
    wanted = os.environ.get("KLEAR_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"KLEAR_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if nvcc is None and wanted == "1":
        raise SystemExit("KLEAR_CUDA=1 but no nvcc on the PATH or under CUDA_HOME")
    return nvcc


def cuda_archs() -> list[str]:
    """The architectures to compile for, as nvcc spells them, with +PTX where asked."""
    listed = os.environ.get("KLEAR_CUDA_ARCHS") or DEFAULT_ARCHS
    archs = [arch.strip().replace(".", "") for arch in re.split("[;, ]", listed) if arch.strip()]
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch)]
    if wrong or not archs:
        raise SystemExit(f"KLEAR_CUDA_ARCHS={listed!r} must read like {DEFAULT_ARCHS!r}")
    return archs


def gencode_flags(archs: list[str]) -> list[str]:
    """The -gencode options of `archs`: machine code for each, PTX where marked."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch != number:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def nvcc_command(nvcc: str, archs: list[str]) -> list[str]:
    """Everything but source and object. ptxas reports registers and spills."""
    flags = ["-O3", "-std=c++17", "--threads", "2", "-Xptxas", "-v", f'-DKLEAR_CUDA_ARCHS="{";".join(archs)}"']
    return [nvcc, *flags, "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode_flags(archs)]


class BuildPolicyLoss(build_ext):
    """Compiles each source that changed, in parallel, and links them into one module."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`, whose `sources` are the object list of this build."""
        nvcc, archs = find_nvcc(), cuda_archs()
        cxx = os.environ.get("CXX", "g++")
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        python_include = [f"-I{path}" for path in self.include_dirs]
        cpp = [cxx, *CXX_FLAGS, f"-I{pybind11_include()}", *python_include]
        jobs = [(cpp, CSRC / name) for name in CPU_SOURCES + ([] if nvcc else ["cuda_absent.cpp"])]
        if nvcc:
            jobs += [(nvcc_command(nvcc, archs), CSRC / name) for name in CUDA_SOURCES]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda job: self.compile_one(*job, folder), reversed(jobs)))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".linking")
        link = (
            [nvcc, "-shared", "--cudart", "static", "-Xcompiler", "-fopenmp"] if nvcc else [cxx, "-shared", "-fopenmp"]
        )
        subprocess.run([*link, "-o", str(fresh), *map(str, objects)], check=True)
        fresh.replace(target)

    def compile_one(self, command: list[str], source: Path, folder: Path) -> Path:
        """The object of one source, compiled again only when its command, itself or a header is newer."""
        compiled = folder / f"{source.name}.o"
        record = folder / f"{source.name}.command"
        line = [*command, "-c", str(source), "-o", str(compiled)]
        newest = max(
            path.stat().st_mtime for path in [source, *CSRC.glob("*.h"), *CSRC.glob("*.inl"), *CSRC.glob("*.cuh")]
        )
        same = record.is_file() and record.read_text() == "\n".join(line)
        if same and compiled.is_file() and compiled.stat().st_mtime > newest and not self.force:
            return compiled
        record.unlink(missing_ok=True)
        done = subprocess.run(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        (folder / f"{source.name}.log").write_text(done.stdout)
        if done.returncode:
            raise SystemExit(f"{' '.join(line)}\n{done.stdout}")
        record.write_text("\n".join(line))
        return compiled


setup(
    ext_modules=[Extension("megatron_klear.kernels._policy_loss", sources=[])],
    cmdclass={"build_ext": BuildPolicyLoss},
)
