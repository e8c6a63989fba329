"""A model folder whose context is extended by YaRN: another config.json over the same weights and tokenizer."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_klear.errors import UserError

from .architecture import read_architecture
from .rope import read_rope

PAPER_FACTOR = 2.5
"""Of arXiv 2508.07629, section 4.1: 64K by YaRN with factor 2.5 over the 32,768 positions of training."""


def trained_positions(max_positions: int) -> int:
    """The length that YaRN starts from where nobody says it: the largest power of two in `max_positions`.

    Qwen3's 40,960 are 32,768 and room for a prompt, and its model card extends from 32,768.
    """
    return 1 << (max_positions.bit_length() - 1)


def extended_config(config: Mapping[str, Any], factor: float, original: int | None, source: str) -> dict[str, Any]:
    """`config` with YaRN from `original` positions (None: `trained_positions`) to `factor` times as many.

    In the spelling that the config has: `rope_parameters` of transformers 5, else `rope_scaling` of transformers 4 and
    vLLM. Raises UserError where it is scaled already, or where that would shorten the model.
    """
    rope = read_rope(config, source)
    if rope.kind != "default":
        raise UserError(f"{source}: the rotary embedding is scaled already ({rope.kind}); extend the original model")
    positions = int(config["max_position_embeddings"])
    original = trained_positions(positions) if original is None else original
    if not 1 <= original <= positions:
        raise UserError(f"{original} original positions: the model has {positions}, and was trained with no more")
    if not math.isfinite(factor * original):
        raise UserError(f"factor {factor:g} is no number that positions could be multiplied by")
    longest = int(factor * original)
    if longest <= positions:
        raise UserError(f"factor {factor:g} over {original} positions gives {longest}, and the model has {positions}")
    table = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    # Of two tables one is kept: the other would say that nothing is scaled.
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    # One that stood beside it, of no effect until now, would contradict the new one or move where the scaling begins.
    kept.pop("original_max_position_embeddings", None)
    if config.get("rope_parameters"):
        return {**kept, "max_position_embeddings": longest, "rope_parameters": {**table, "rope_theta": rope.theta}}
    return {**kept, "max_position_embeddings": longest, "rope_theta": rope.theta, "rope_scaling": table}


def write_extended(folder: Path, output: Path, factor: float = PAPER_FACTOR, original: int | None = None) -> Path:
    """Write `output`: the extended config.json, everything else links to the files and folders of `folder`.

    An output that is what would be written is left alone. Raises UserError where the model cannot be extended or
    `output` is something else, or a file of `folder` is a link to nothing.
    """
    read_architecture(folder)  # a folder that is no model is refused in its own words
    if broken := [path for path in sorted(folder.iterdir()) if not path.exists()]:
        raise UserError(f"{broken[0]} is a link to {os.readlink(broken[0])}, which is not there; fetch the model again")
    source = folder / "config.json"
    config = extended_config(json.loads(source.read_text()), factor, original, str(source))
    if output.exists():
        try:
            same = json.loads((output / "config.json").read_text()) == config
        except (OSError, ValueError):
            same = False
        # A folder that the model has got since, of an evaluation say, is none of its files.
        wanted = [path for path in _others(folder, output) if path.is_file() or (output / path.name).is_symlink()]
        if same and all((output / path.name).resolve() == path.resolve() for path in wanted):
            return output
        raise UserError(f"{output} exists and is another folder; choose another, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{output} would lie in a file; choose another output") from None
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for path in _others(folder, output):
            (beside / path.name).symlink_to(path.resolve())
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        beside.chmod(0o755)
        os.rename(beside, output)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return output


def _others(folder: Path, output: Path) -> list[Path]:
    """All of a model but its config.json. Templates may have a folder of their own; what tools leave is hidden."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name != "config.json"
        and (path.is_file() or (path.is_dir() and not path.name.startswith(".")))
        and not output.absolute().is_relative_to(path.absolute())
    ]
