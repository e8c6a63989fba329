"""Shapes of the models that the recipes name, for plans on machines that do not have the models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_klear.models.architecture import (
    Architecture,
    ArchitectureError,
    architecture_from_config,
    read_architecture,
)

SHAPES = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModel:
    """The shape that a plan is made with."""

    architecture: Architecture
    note: str
    """Where the shape comes from, empty where it is the model's own."""


def planned_model(folder: Path) -> PlannedModel:
    """The shape of the model in `folder`; where that is missing, the shipped one whose name begins the folder's.

    `models/Qwen3-8B-Base` is planned as Qwen3-8B-Base, `models/Qwen3-8B-SFT` as Qwen3-8B. Raises ArchitectureError
    where the folder is there and cannot be read, or is missing and of no shipped name.
    """
    folder = Path(folder)
    if folder.exists():
        return PlannedModel(architecture=read_architecture(folder), note="")
    names = sorted((path.stem for path in SHAPES.glob("*.json")), key=len, reverse=True)
    name = next((name for name in names if f"{folder.name}-".startswith(f"{name}-")), None)
    if name is None:
        raise ArchitectureError(
            f"model.path {folder} does not exist, and a plan needs its config.json; this package has the shapes of "
            f"{', '.join(sorted(names))}, for folders of these names"
        )
    config = json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8"))
    return PlannedModel(
        architecture=architecture_from_config(config, source=f"{name}.json"),
        note=f"{folder} is not on this machine: planned with the shape of {name}, which comes with this package",
    )
