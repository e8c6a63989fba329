"""Two checkpoints side by side: every tensor, and everything beside the tensors, without a model or process groups.

Layouts write the same global tensors under the same names, so checkpoints of different layouts compare as well.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore.checkpoints import manifest

device_shim.install()

from megatron.core.dist_checkpointing.serialization import load_common_state_dict  # noqa: E402  (the shim comes first)

_BYTES_AT_ONCE = 2**28


@dataclass(kw_only=True, slots=True)
class CheckpointDifference:
    """What differs between two checkpoints."""

    num_tensors: int = 0
    num_optimizer_tensors: int = 0
    unequal_tensors: list[str] = field(default_factory=list)
    """Names of tensors that are not bitwise equal, or in one of the two alone."""
    largest: float = 0.0
    """Over all tensors: largest absolute difference over the tensor's largest absolute value."""
    largest_in: str = ""
    unequal_state: list[str] = field(default_factory=list)
    """What differs beside the tensors: optimizer settings, generator states, step, position in the data."""

    @property
    def bitwise_equal(self) -> bool:
        """Nothing differs."""
        return not self.unequal_tensors and not self.unequal_state


def compare_checkpoints(first: Path, second: Path) -> CheckpointDifference:
    """Compare two checkpoint folders; memory is that of a few tensors.

    A vocabulary padded for tensor parallelism is compared in the rows that both have.
    Raises CheckpointError where a folder is no checkpoint.
    """
    found = CheckpointDifference()
    own, other = _tensors(first), _tensors(second)
    found.unequal_tensors += [f"{name} is in one alone" for name in sorted(own.keys() ^ other.keys())]
    for name, a, b in _pairs(first, second, {name: (own[name], other[name]) for name in sorted(own.keys() & other)}):
        found.num_tensors += 1
        found.num_optimizer_tensors += name.startswith("optimizer.")
        if own[name].size != other[name].size or a.dtype != b.dtype or not torch.equal(_bits(a), _bits(b)):
            found.unequal_tensors.append(name)
            difference = _relative(a, b)
            if difference >= found.largest:
                found.largest, found.largest_in = difference, name
    mine, theirs = manifest.read_training(first), manifest.read_training(second)
    for key in ("step", "extra", "has_optimizer"):
        found.unequal_state += _unequal(mine[key], theirs[key], f"training.json {key}")
    found.unequal_state += _unequal(_common(first), _common(second), "state")
    return found


def _tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = FileSystemReader(str(path)).read_metadata()
    except Exception as error:
        raise manifest.CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    items = metadata.state_dict_metadata.items()
    return {name: entry for name, entry in items if isinstance(entry, TensorStorageMetadata)}


def _common(path: Path) -> Any:
    """What Megatron keeps beside the sharded tensors; its versions put that in different places."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="load_common is deprecated")
        return load_common_state_dict(str(path))


def _pairs(
    first: Path, second: Path, entries: dict[str, tuple[TensorStorageMetadata, TensorStorageMetadata]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Both tensors of each name, cut to the size both have, read a bounded number of bytes at a time."""
    pending, size = [], 0
    for name, (entry, _) in entries.items():
        pending.append(name)
        size += math.prod(entry.size) * entry.properties.dtype.itemsize
        if size >= _BYTES_AT_ONCE or name == list(entries)[-1]:
            a = _read(first, {key: entries[key][0] for key in pending})
            b = _read(second, {key: entries[key][1] for key in pending})
            for key in pending:
                both = tuple(slice(0, min(pair)) for pair in zip(a[key].shape, b[key].shape, strict=True))
                yield key, a[key][both], b[key][both]
            pending, size = [], 0


def read_tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names are wanted, whole, by Megatron's names.

    Raises CheckpointError where it is none.
    """
    return _read(path, {name: entry for name, entry in _tensors(path).items() if wanted(name)})


def _read(path: Path, entries: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=FileSystemReader(str(path)), no_dist=True)
    return tensors


def _bits(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN equals itself and -0 does not equal 0."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _relative(a: Tensor, b: Tensor) -> float:
    scale = float(a.double().abs().max())
    return float((a.double() - b.double()).abs().max()) / (scale or 1.0)


def _unequal(a: Any, b: Any, where: str) -> list[str]:
    """Places at which two nested plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}.{key} is in one alone" for key in a.keys() ^ b.keys()]
        return found + [place for key in a.keys() & b.keys() for place in _unequal(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where} has {len(a)} and {len(b)} entries"]
        return [place for n, (x, y) in enumerate(zip(a, b, strict=True)) for place in _unequal(x, y, f"{where}[{n}]")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        return [] if same else [where]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]
