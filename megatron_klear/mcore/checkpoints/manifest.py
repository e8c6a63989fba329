"""What a checkpoint folder says of itself: its manifest, whether it is whole, which one is newest, what may go."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_klear.config.files import flush_to_disk
from megatron_klear.errors import UserError
from megatron_klear.models.stop_tokens import Turns, name_turn_end

MANIFEST = "manifest.json"
TRAINING = "training.json"
_STEP = re.compile(r"step-(\d{8,})")
_TEMPLATE = "chat_template.jinja"
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    _TEMPLATE,
    "chat_template.json",
    "LICENSE",
)
_TEMPLATES = "additional_chat_templates"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, found or read; the message names the folder and the remedy."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return checkpoints / f"step-{step:08d}"


def steps(checkpoints: Path) -> list[int]:
    """Steps that have a published checkpoint, ascending. Nothing is said of their contents."""
    if not checkpoints.is_dir():
        return []
    matches = (_STEP.fullmatch(entry.name) for entry in checkpoints.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def read_training(path: Path) -> dict[str, Any]:
    """The checkpoint's `training.json`. Raises CheckpointError when `path` is no checkpoint."""
    try:
        training: dict[str, Any] = json.loads((path / TRAINING).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: {TRAINING} cannot be read ({error}); expected a folder such "
            "as output/checkpoints/step-00000100, or convert a Hugging Face folder with tools/convert_hf_to_mcore.py"
        ) from error
    return training


def copy_model_files(source: Path, target: Path, turns: Turns | None = None) -> None:
    """Copy config.json and the tokenizer's files, so that a checkpoint can be converted by itself.

    The copies have the end of turn among the ends of a response, and the chat template, of `turns`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in _MODEL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES, dirs_exist_ok=True, copy_function=shutil.copyfile)
    turns = turns or Turns()
    name_turn_end(target, turns.end)
    if turns.template is not None:
        (target / _TEMPLATE).write_text(turns.template, encoding="utf-8")  # hides the one of tokenizer_config.json


def note_written(folder: Path, rank: int) -> None:
    """Flush the shards that `rank` wrote to disk and note their sizes and SHA-256 beside them.

    To be called by the process that wrote them: on a network disk only the writer's own flush proves anything, and
    hashing 14 GB takes ten seconds and more, which training need not wait for when the writer is in the background.
    """
    entries = {file.name: _entry(file) for file in _shards(folder, rank)}
    for name in entries:
        flush_to_disk(folder / name)
    (folder / _note(rank)).write_text(json.dumps(entries))


def written(folder: Path, rank: int) -> dict[str, Any]:
    """What `note_written` noted for `rank`, which is noted now where its writer ended before it did."""
    if not (folder / _note(rank)).is_file():
        note_written(folder, rank)
    entries: dict[str, Any] = json.loads((folder / _note(rank)).read_text())
    (folder / _note(rank)).unlink()
    return entries


def _shards(folder: Path, rank: int) -> list[Path]:
    """Megatron's files of one rank; their names begin with its number."""
    return sorted(folder.glob(f"__{rank}_*"))


def _note(rank: int) -> str:
    return f".written-{rank}.json"


def _entry(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def publish(hidden: Path, path: Path, shards: dict[str, Any] | None = None) -> None:
    """Write the manifest, flush to disk and rename the folder into place.

    `shards` are the entries of files that their writers have hashed and flushed already; the others are here.
    A folder that is in the way (a damaged checkpoint of the same step) is moved aside, never deleted.
    """
    entries = dict(shards or {})
    for file in [file for file in sorted(hidden.rglob("*")) if file.is_file()]:
        if (name := str(file.relative_to(hidden))) not in entries and name != MANIFEST:
            entries[name] = _entry(file)
            flush_to_disk(file)
    (hidden / MANIFEST).write_text(json.dumps({"files": dict(sorted(entries.items()))}, indent=1))
    flush_to_disk(hidden / MANIFEST)
    for folder in [hidden, *(entry for entry in hidden.rglob("*") if entry.is_dir())]:
        flush_to_disk(folder)
    if path.exists():
        aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.replaced-{n}")).exists())
        path.rename(aside)
    hidden.rename(path)
    flush_to_disk(path.parent)


def damage(path: Path, share: int = 0, shares: int = 1, *, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, as sentences; empty when it is whole.

    Checks every `shares`-th file, so that ranks can divide the work; `hashes` false compares sizes alone.
    """
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path / MANIFEST} cannot be read: {error}"]
    problems = []
    for name in sorted(files)[share::shares]:
        file, entry = path / name, files[name]
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != entry["size"]:
            problems.append(f"{file} has {file.stat().st_size} bytes, the manifest says {entry['size']}")
        elif hashes:
            with open(file, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
                    problems.append(f"{file} does not have the hash of the manifest")
    return problems


def retire(checkpoints: Path, keep: int, keep_every: int) -> list[int]:
    """Remove published checkpoints older than the `keep` newest, but for multiples of `keep_every`; returns them."""
    removed = []
    for step in steps(checkpoints)[:-keep]:
        if keep_every and step % keep_every == 0:
            continue
        # Renamed first, so that a kill half way leaves nothing that looks like a checkpoint.
        doomed = checkpoints / f".removing-{step}"
        step_folder(checkpoints, step).rename(doomed)
        shutil.rmtree(doomed)
        removed.append(step)
    return removed


def sweep(checkpoints: Path) -> None:
    """Remove what a killed run left unfinished: folders still being saved or being removed."""
    if not checkpoints.is_dir():
        return
    for entry in checkpoints.iterdir():
        if entry.name.startswith((".saving-", ".removing-")):
            shutil.rmtree(entry, ignore_errors=True)


def warn(message: str) -> None:
    """Say it where nobody overlooks it."""
    print(f"WARNING: {message}", file=sys.stderr, flush=True)
