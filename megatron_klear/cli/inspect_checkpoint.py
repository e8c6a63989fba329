"""Show what a Hugging Face folder or a Megatron checkpoint holds, and whether it is whole.

klear inspect runs/sft/checkpoints/step-00001000
klear inspect models/Qwen3-8B-Base --json

Exit code 1 when something is damaged or missing. Tensors are listed, not loaded; `--no-hashes` compares sizes alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def inspect_hf(folder: Path) -> dict[str, Any]:
    """Contents of a Hugging Face folder; `problems` says where its tensors do not fit its config.json."""
    from megatron_klear.errors import UserError
    from megatron_klear.mcore.weights import open_weights
    from megatron_klear.models.architecture import read_architecture
    from megatron_klear.models.safetensors_io import SafetensorsFolder

    specs = list(SafetensorsFolder(folder).specs.values())
    problems = []
    try:
        open_weights(read_architecture(folder), folder)
    except UserError as error:
        problems.append(str(error))
    return {"kind": "huggingface", "tensors": [_row(spec) for spec in specs], "problems": problems}


def inspect_checkpoint(folder: Path, *, hashes: bool) -> dict[str, Any]:
    """Contents of a Megatron checkpoint; `problems` says which files differ from its manifest."""
    from megatron_klear.mcore.checkpoints.convert import checkpoint_tensors
    from megatron_klear.mcore.checkpoints.manifest import CheckpointError, damage, read_training

    report: dict[str, Any] = {"kind": "megatron", "tensors": [], "problems": damage(folder, hashes=hashes)}
    try:
        training = read_training(folder)
        names = ("step", "has_optimizer", "layout", "world_size", "versions", "extra", "base")
        report |= {name: training.get(name) for name in names}
        report["tensors"] = [_row(spec) for spec in checkpoint_tensors(folder)]
    except CheckpointError as error:
        report["problems"].append(str(error))
    return report


def inspect_folder(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """What `folder` holds, with totals. `parameters` leaves out optimizer state."""
    from megatron_klear.mcore.checkpoints.manifest import MANIFEST, TRAINING

    megatron = any((folder / name).exists() for name in (MANIFEST, TRAINING, ".metadata"))
    report = inspect_checkpoint(folder, hashes=hashes) if megatron else inspect_hf(folder)
    weights = [row for row in report["tensors"] if not row["name"].startswith("optimizer.")]
    totals = {
        "parameters": sum(row["elements"] for row in weights),
        "bytes": sum(row["bytes"] for row in report["tensors"]),
    }
    return {"path": str(folder), **report, **totals}


def _row(spec: Any) -> dict[str, Any]:
    row = {
        "name": spec.name,
        "shape": list(spec.shape),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "elements": spec.num_elements,
        "bytes": spec.num_bytes,
    }
    return row if spec.file is None else {**row, "file": spec.file.name}


def show(report: dict[str, Any]) -> None:
    """Print a report for people."""
    width = max((len(row["name"]) for row in report["tensors"]), default=0)
    for row in report["tensors"]:
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        print(f"{row['name']:<{width}}  {row['dtype']:<9} {shape:>22} {row['bytes'] / 1e6:>12.3f} MB")
    print(f"\n{report['path']}: {report['kind']}, {len(report['tensors'])} tensors")
    print(f"{report['parameters']:,} parameters (vocabulary padding included), {report['bytes'] / 1e9:.3f} GB")
    if report.get("step") is not None:
        optimizer = "with" if report["has_optimizer"] else "without"
        print(f"step {report['step']}, {optimizer} optimizer state, written by {report['world_size']} processes")
    if base := report.get("base"):
        print(f"adapters of rank {base['rank']}, alpha {base['alpha']:g} on {', '.join(base['targets'])}")
        print(f"of the model {base['model']}, SHA-256 {base['sha256']}")
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    if not report["problems"]:
        print("every file as its manifest says" if report["kind"] == "megatron" else "tensors as config.json says")


def main(arguments: list[str] | None = None) -> int:
    """Inspect one folder; exit code 1 when it is damaged or none of either kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face model folder or Megatron checkpoint")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-hashes", action="store_true", help="do not read the files to hash them")
    options = parser.parse_args(arguments)
    from megatron_klear.errors import UserError

    try:
        report = inspect_folder(options.folder, hashes=not options.no_hashes)
    except (UserError, OSError) as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return 1 if report["problems"] else 0
