"""Say what of this machine the project can use, what stands in for what is absent, and what a run would lack.

    python tools/doctor.py
    python tools/doctor.py --config examples/sft_32k.toml [--dotted.key value ...]
    python tools/doctor.py --json

Exit code 1 when a required package is missing, or with --config when the run could not start here; what may be absent
is reported and no error. Every package is looked up without importing it first, and one that does not import is
reported with its own words, so that a broken installation is a line of the report and not a crash of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

State = Literal["ok", "absent", "broken", "missing"]
PYTHONS = ((3, 11), (3, 12))


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report.

    `ok`; `absent`: optional and replaced by what `detail` says; `broken`: there but of no use; `missing`: required.
    """

    name: str
    state: State
    detail: str


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None without one."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def import_error(module: str) -> str | None:
    """Why an installed module does not import, in its own words; None when it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken package raises is what the report is for
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def first_line(command: Sequence[str], pattern: str) -> str | None:
    """The first match of `pattern` (its group 1) in what a program prints, None where it cannot be run."""
    if shutil.which(command[0]) is None:
        return None
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    match = re.search(pattern, shown)
    return match[1].strip() if match else None


def find_python() -> Finding:
    """Interpreter and machine."""
    here = f"{platform.python_version()} at {sys.executable}, {platform.machine()} {platform.system()}"
    if sys.version_info[:2] in PYTHONS:
        return Finding(name="Python", state="ok", detail=here)
    return Finding(name="Python", state="broken", detail=f"{here}; the project is tested on 3.11 and 3.12")


def find_torch() -> list[Finding]:
    """Torch's build, the GPUs that it sees, and NCCL."""
    if find_spec("torch") is None:
        return [Finding(name="torch", state="missing", detail="not installed: see README.md, the first command")]
    if error := import_error("torch"):
        return [Finding(name="torch", state="broken", detail=error)]
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
    findings = [Finding(name="torch", state="ok", detail=f"{torch.__version__}, {build}")]
    driver = first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"(\S+)")
    if not torch.cuda.is_available():
        gap = "runs use the CPU over gloo"
        if driver and not torch.version.cuda:
            gap = f"there is a driver ({driver}), but this torch is a CPU build: install one for CUDA"
        elif torch.version.cuda and driver is None:
            gap = "no NVIDIA driver; runs use the CPU over gloo"
        return [*findings, Finding(name="GPU", state="absent", detail=gap)]
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    cards = ", ".join(f"{card.name} {card.total_memory / 2**30:.0f} GiB sm_{card.major}{card.minor}" for card in names)
    findings.append(Finding(name="GPU", state="ok", detail=f"{cards}; driver {driver or 'unknown'}"))
    if torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))
        return [*findings, Finding(name="NCCL", state="ok", detail=version)]
    return [*findings, Finding(name="NCCL", state="broken", detail="this torch has none; several GPUs cannot be used")]


def find_megatron() -> Finding:
    """megatron-core's version."""
    version = version_of("megatron-core")
    if version is None:
        return Finding(
            name="megatron-core", state="missing", detail="not installed: pip install 'megatron-core>=0.16.1'"
        )
    return Finding(name="megatron-core", state="ok", detail=version)


def find_optional(name: str, module: str, distribution: str, instead: str) -> Finding:
    """A package that is used when importable: its version, or what happens `instead`."""
    if find_spec(module) is None:
        return Finding(name=name, state="absent", detail=instead)
    if error := import_error(module):
        return Finding(name=name, state="broken", detail=f"{error}; {instead}")
    return Finding(name=name, state="ok", detail=version_of(distribution) or "version unknown")


def find_apex() -> Finding:
    """NVIDIA's Apex with its fused optimizer; the `apex` of the package index is something else."""
    instead = "transformer-engine's or torch's Adam"
    if find_spec("apex") is None:
        return Finding(name="NVIDIA Apex", state="absent", detail=instead)
    lacking = [module for module in ("apex.optimizers", "amp_C") if import_error(module)]
    if not lacking:
        fusion = import_error("fused_weight_gradient_mlp_cuda") is None
        detail = "fused Adam" + (
            ", gradient accumulation in the GEMM" if fusion else "; no gradient accumulation fusion"
        )
        return Finding(name="NVIDIA Apex", state="ok", detail=detail)
    detail = (
        f"a package called apex is installed, but without {' and '.join(lacking)}: it is not NVIDIA's or not built "
    )
    return Finding(name="NVIDIA Apex", state="broken", detail=f"{detail}with its CUDA extensions; {instead}")


def find_varlen() -> Finding:
    """Torch's own variable-length attention."""
    if find_spec("torch") is None or import_error("torch.nn.attention.varlen"):
        return Finding(name="torch varlen attention", state="absent", detail="FlashAttention, or SDPA per sequence")
    return Finding(name="torch varlen attention", state="ok", detail="used on a GPU where FlashAttention is absent")


def find_nvcc() -> Finding:
    """The CUDA compiler."""
    version = first_line(["nvcc", "--version"], r"release ([\d.]+)")
    if version is None:
        return Finding(name="nvcc", state="absent", detail="the extension is built without its CUDA part")
    return Finding(name="nvcc", state="ok", detail=version)


def find_extension() -> Finding:
    """The compiled part of the fused loss."""
    name, instead = "compiled extension", "the loss runs on its plain torch reference, slower"
    if find_spec("torch") is None:
        return Finding(name=name, state="absent", detail="needs torch")
    if error := import_error("megatron_klear.kernels"):
        return Finding(name=name, state="broken", detail=f"{error}; {instead}")
    from megatron_klear.kernels import available

    here = available()
    if not here.built:
        return Finding(name=name, state="absent", detail=f"{here.reason}; {instead}")
    cuda = f"CUDA for sm {', '.join(here.cuda_archs)}" if here.cuda_archs else "no CUDA part"
    if here.cpu_isa is None:
        return Finding(name=name, state="broken", detail=here.reason)
    return Finding(name=name, state="ok", detail=f"CPU with {here.cpu_isa}, {cuda}")


def find_dependencies(project: Path = ROOT / "pyproject.toml") -> list[Finding]:
    """The required packages of pyproject.toml that are not there or too old, and one line for those that are."""
    if find_spec("packaging") is None:
        return [Finding(name="dependencies", state="missing", detail="nothing is installed: pip install -e .")]
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in tomllib.loads(project.read_text())["project"]["dependencies"]]
    wrong = []
    for requirement in requirements:
        version = version_of(requirement.name)
        if version is None:
            wrong.append(Finding(name=requirement.name, state="missing", detail=f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            detail = f"{version} is installed: pip install '{requirement}'"
            wrong.append(Finding(name=requirement.name, state="missing", detail=detail))
    fitting = f"{len(requirements) - len(wrong)} of {len(requirements)} required packages fit"
    return [Finding(name="dependencies", state="missing" if wrong else "ok", detail=fitting), *wrong]


PROBES: tuple[Callable[[], Finding | list[Finding]], ...] = (
    find_python,
    find_torch,
    find_megatron,
    find_dependencies,
    find_extension,
    find_nvcc,
    lambda: find_optional(
        "transformer-engine", "transformer_engine", "transformer-engine", "Megatron's and our own layers; no FP8"
    ),
    find_apex,
    lambda: find_optional("FlashAttention", "flash_attn", "flash-attn", "torch's varlen attention, or SDPA"),
    find_varlen,
    lambda: find_optional("vLLM", "vllm", "vllm", "not needed in the training environment"),
)


def examine() -> list[Finding]:
    """Every probe's findings; a probe that fails is itself a finding."""
    findings: list[Finding] = []
    for probe in PROBES:
        try:
            found = probe()
        except Exception as error:  # the report must come out on any machine
            found = Finding(name=getattr(probe, "__name__", "probe"), state="broken", detail=f"{error!r}")
        findings += found if isinstance(found, list) else [found]
    return findings


def lacks(arguments: Sequence[str]) -> list[str]:
    """What keeps the run of `--config X.toml ...` from starting on this machine, a sentence each."""
    try:
        from megatron_klear.architecture import ArchitectureError, read_architecture
        from megatron_klear.checks import check_files, check_layout, check_packages
        from megatron_klear.config import SFTConfig
        from megatron_klear.settings import SettingsError, load
    except ImportError as error:
        return [f"the settings cannot be read before the required packages are installed: {error}"]
    try:
        config = load(SFTConfig, list(arguments))
    except SettingsError as error:
        return list(error.problems)
    problems = [*check_packages(config), *check_files(config)]
    if config.parallel.device == "cuda" and not _sees_gpu():
        problems.append("parallel.device is cuda, and torch sees no GPU; use auto or cpu")
    try:
        architecture = read_architecture(config.model.path)
    except ArchitectureError as error:
        problems.append(str(error))
    else:
        problems += check_layout(config, architecture, config.parallel.model_size)
    return list(dict.fromkeys(problems))


def _sees_gpu() -> bool:
    if find_spec("torch") is None or import_error("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def show(findings: Sequence[Finding], problems: Sequence[str] | None) -> None:
    """Print the report."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.state:8}{finding.name:{width + 2}}{finding.detail}")
    if problems is None:
        return
    print("\nThis run could start here." if not problems else "\nThis run could not start here:")
    for problem in problems:
        print(f"  {problem}")


def main(arguments: list[str] | None = None) -> int:
    """Report; exit code 1 when something required is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--dependencies", action="store_true", help="look at the required packages alone")
    parser.add_argument("--config", type=Path, help="settings of a run; dotted overrides may follow")
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.config is None:
        parser.error(f"{overrides[0]}: overrides need --config")
    findings = find_dependencies() if options.dependencies else examine()
    problems = None if options.config is None else lacks(["--config", str(options.config), *overrides])
    if options.json:
        report: dict[str, Any] = {"findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report if problems is None else {**report, "problems": problems}, indent=2))
    else:
        show(findings, problems)
    return int(bool(problems) or any(finding.state == "missing" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
