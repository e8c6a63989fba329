"""Compiles csrc/ for the emulated device, once for each content of the sources, into a cache folder of the user's."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from emulator.translate import translate

CSRC = Path(__file__).resolve().parents[3] / "csrc"
RUNTIME = Path(__file__).resolve().parent / "runtime"
DEVICE_SOURCES = ("cuda_one_read.cu", "cuda_sharded.cu", "cuda_two_read.cu", "policy_loss_cuda.cu")
CLUSTER_SOURCES = ("cuda_one_read.cu", "cuda_sharded.cu")
KEPT_SECONDS = 30 * 24 * 3600  # what was not used for so long is deleted
PLAIN = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-Wall", "-Wextra")
RUNTIME_FLAGS = ("-O2",)
# Every load and store calls the runtime, as does undefined behaviour; variables that are not set hold a pattern.
DEVICE_FLAGS = (
    "-O1",
    "-g1",
    "-fsanitize=thread",
    *("--param", "tsan-instrument-func-entry-exit=0"),
    "-fsanitize=undefined,float-cast-overflow,alignment",
    "-fno-sanitize=vptr,null",
    "-ftrivial-auto-var-init=pattern",
    "-fno-strict-aliasing",
    *("-Wno-tsan", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-label"),
    "-D__CUDACC__",
    '-DKLEAR_CUDA_ARCHS="emulated"',
)


def why_absent() -> str:
    """Why the emulated device cannot be built here, empty where it can."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the emulated device switches threads in x86-64 assembly, on Linux"
    return "" if shutil.which("g++") else "the emulated device needs g++"


def read_sources() -> dict[str, str]:
    """The files of csrc/ that the device's code is made of, by name."""
    return {path.name: path.read_text() for path in sorted(CSRC.iterdir()) if path.suffix in (".cu", ".cuh", ".h")}


def cache_folder() -> Path:
    """Where what was built is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "megatron_klear" / "emulated"


def build(
    sources: dict[str, str] | None = None,
    architecture: int = 900,
    one_read_for: int | None = None,
    flags: tuple[str, ...] = (),
) -> Path:
    """The library of `sources` (None: those of csrc/) as __CUDA_ARCH__ `architecture` makes it.

    The one-read kernel is compiled for `one_read_for` where that is given. Processes that want the same wait for the
    first. Raises RuntimeError with the compiler's words.
    """
    sources = read_sources() if sources is None else sources
    runtime = {path.name: path.read_text() for path in sorted(RUNTIME.iterdir())}
    translated = {name: translate(text, name) if ".cu" in name else text for name, text in sources.items()}
    objects = []
    for name in DEVICE_SOURCES:
        compiled_for = one_read_for or architecture if name in CLUSTER_SOURCES else architecture
        device_flags = (*PLAIN, *DEVICE_FLAGS, f"-D__CUDA_ARCH__={compiled_for}", *flags)
        objects.append(_object(name, translated, runtime, device_flags))
    own = [name for name in runtime if name.endswith(".cpp")]
    objects += [_object(name, runtime, {}, (*PLAIN, *RUNTIME_FLAGS)) for name in own]
    for path in cache_folder().glob("*"):
        if path.stat().st_mtime < time.time() - KEPT_SECONDS:
            path.unlink(missing_ok=True)
    library = cache_folder() / f"{_digest('link', *map(str, objects))}.so"
    return _made(library, ["g++", "-shared", "-ldl", *map(str, objects)])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _object(name: str, files: dict[str, str], others: dict[str, str], flags: tuple[str, ...]) -> Path:
    """The object of one source; `files` are the folder that it lies in, `others` that of its headers."""
    headers = {header: text for header, text in (others | files).items() if header.endswith((".h", ".cuh"))}
    key = _digest(_compiler(), name, files[name], *flags, *(part for item in sorted(headers.items()) for part in item))
    compiled = cache_folder() / f"{key}.o"
    if compiled.is_file():
        os.utime(compiled)
        return compiled
    with tempfile.TemporaryDirectory() as folder:
        for header, text in (headers | {name: files[name]}).items():
            Path(folder, header).write_text(text)
        return _made(compiled, ["g++", *flags, f"-I{folder}", "-c", "-x", "c++", f"{folder}/{name}"])


def _compiler() -> str:
    return subprocess.run(["g++", "-dumpfullversion"], text=True, capture_output=True, check=True).stdout


def _made(target: Path, command: list[str]) -> Path:
    """`target`, made by `command` where it is not there yet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            os.utime(target)
            return target
        fresh = target.with_suffix(".making")
        done = subprocess.run([*command, "-o", str(fresh)], text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        fresh.replace(target)
    return target
