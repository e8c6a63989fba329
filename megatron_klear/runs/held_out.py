"""Accuracy of every held-out prompt at every validation of a run."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from megatron_klear.types import Verdict

from .rollout_files import read_samples, rollout_files


def held_out(folder: Path) -> dict[int, dict[str, float]]:
    """Accuracy of every prompt, by its id, at every step with a validation whose samples were kept."""
    found = {}
    for path in rollout_files(folder / "validation"):
        right: dict[str, list[bool]] = defaultdict(list)
        for record in read_samples(path)[1]:
            right[record["prompt_id"]].append(record["verdict"] == Verdict.RIGHT.value)
        found[int(path.stem.removeprefix("step-"))] = {name: float(np.mean(of)) for name, of in right.items()}
    return found
