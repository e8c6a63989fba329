"""Hugging Face weight folders, read by slice and written as a stream.

The reader checks every file's header against its length before a tensor is touched, so that a truncated download is
named at once. The writer knows all tensors beforehand: it lays out the shards, sees that the disk holds them, streams
each tensor to its place, and the folder gets its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_klear.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
_MAX_HEADER_BYTES = 100 * 10**6

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".gguf")


class SafetensorsError(UserError, ValueError):
    """A weight folder or file that is missing, damaged or incomplete, or an output that may not be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of a tensor, and the file that holds it where it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.num_elements * self.dtype.itemsize

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return int(torch.Size(self.shape).numel())


class SafetensorsFolder:
    """The tensors of a folder's `model.safetensors`, or of the shards that its index names, in the files' order.

    Opening it reads and checks all headers and no data. Raises SafetensorsError naming the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SafetensorsError(f"{self.folder} is not a folder: expected a Hugging Face model folder")
        self.specs: dict[str, TensorSpec] = {}
        self._open: dict[Path, Any] = {}
        if (self.folder / INDEX_FILE).is_file():
            self._read_index(self.folder / INDEX_FILE)
        elif (self.folder / SINGLE_FILE).is_file():
            self._add(read_header(self.folder / SINGLE_FILE))
        else:
            found = sorted(p.name for p in self.folder.iterdir() if p.name.endswith(_WEIGHT_SUFFIXES))
            others = f"; it holds {', '.join(found[:4])}" if found else ""
            raise SafetensorsError(
                f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{others}; weights must be safetensors "
                "(transformers' save_pretrained writes them)"
            )

    def _read_index(self, path: Path) -> None:
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            files = dict.fromkeys(str(name) for name in weight_map.values())
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise SafetensorsError(f"{path} is not a safetensors index with a weight_map: {error!r}") from None
        for file in files:
            if not (self.folder / file).is_file():
                raise SafetensorsError(f"{self.folder / file} is missing: {path.name} names it; download it again")
            self._add(read_header(self.folder / file))
        for name, file in weight_map.items():
            spec = self.specs.get(name)
            if spec is None or spec.file != self.folder / file:
                raise SafetensorsError(f"{self.folder / file} does not hold {name}, which {path.name} places there")

    def _add(self, specs: Sequence[TensorSpec]) -> None:
        for spec in specs:
            if spec.name in self.specs:
                raise SafetensorsError(f"{spec.name} is both in {self.specs[spec.name].file} and in {spec.file}")
            self.specs[spec.name] = spec

    def where(self, name: str) -> str:
        """The file that holds a tensor, or should, for messages."""
        spec = self.specs.get(name)
        if spec is not None:
            return str(spec.file)
        index = self.folder / INDEX_FILE
        return str(index if index.is_file() else self.folder / SINGLE_FILE)

    def sliced(self, name: str) -> Any:
        """A tensor of which only what is indexed (`[a:b]`, `[:, a:b]`) is read."""
        file = self.specs[name].file
        assert file is not None
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU."""
        whole: Tensor = self.sliced(name)[...]
        return whole


def read_header(path: Path) -> list[TensorSpec]:
    """Tensors of one safetensors file, in the order of their data.

    Raises SafetensorsError when the file is not safetensors, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise SafetensorsError(f"{path} is truncated or not a safetensors file ({size} bytes); fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        specs = [_spec(name, entry, path) for name, entry in entries]
        end = max((int(entry["data_offsets"][1]) for _, entry in entries), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, SafetensorsError):
            raise
        raise SafetensorsError(f"{path} has a damaged safetensors header: {error!r}; fetch it again") from None
    if 8 + length + end != size:
        raise SafetensorsError(
            f"{path} is {size} bytes where its header says {8 + length + end}: truncated or damaged; fetch it again"
        )
    return specs


def _spec(name: str, entry: dict[str, Any], path: Path) -> TensorSpec:
    if entry["dtype"] not in _DTYPES:
        raise SafetensorsError(f"{path}: {name} has dtype {entry['dtype']}, which is not supported")
    spec = TensorSpec(name=name, shape=tuple(int(n) for n in entry["shape"]), dtype=_DTYPES[entry["dtype"]], file=path)
    start, end = entry["data_offsets"]
    if end - start != spec.num_bytes:
        raise SafetensorsError(f"{path}: {name} takes {end - start} bytes, its shape and dtype {spec.num_bytes}")
    return spec


class SafetensorsWriter:
    """Writes the tensors of `plan`, one at a time and in that order, into files of at most `max_shard_bytes`.

    A tensor larger than that gets a file of its own. Used as a context manager on a folder that exists; a block left
    without every tensor written is an error, so an unfinished folder never passes for a whole one.
    """

    def __init__(self, folder: Path, plan: Sequence[TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        if max_shard_bytes <= 0:
            raise SafetensorsError(f"the largest shard size must be above 0, not {max_shard_bytes}")
        self.folder = Path(folder)
        self.plan = list(plan)
        needed, free = sum(spec.num_bytes for spec in self.plan), shutil.disk_usage(self.folder).free
        if needed > free:
            raise SafetensorsError(
                f"{self.folder} has {free / 1e9:.2f} GB free and the weights take {needed / 1e9:.2f} GB; "
                "write to another disk"
            )
        self.shards = _shards(self.plan, max_shard_bytes)
        self._written = 0
        self._shard_of = [number for number, shard in enumerate(self.shards) for _ in shard]
        self._file: Any = None

    def __enter__(self) -> SafetensorsWriter:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Check that everything was written and write the index."""
        self._close_file()
        if kind is not None:
            return
        if self._written < len(self.plan):
            raise SafetensorsError(f"{self.plan[self._written].name} was not written to {self.folder}")
        if len(self.shards) > 1:
            self._write_index()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the plan. Raises SafetensorsError when it is not that one."""
        if self._written == len(self.plan):
            raise SafetensorsError(f"{name} is not among the tensors planned for {self.folder}")
        spec = self.plan[self._written]
        if (name, tuple(tensor.shape), tensor.dtype) != (spec.name, spec.shape, spec.dtype):
            raise SafetensorsError(
                f"{self.folder} expects {spec.name} {spec.shape} {spec.dtype}, "
                f"was given {name} {tuple(tensor.shape)} {tensor.dtype}"
            )
        number = self._shard_of[self._written]
        if self._written == 0 or number != self._shard_of[self._written - 1]:
            self._start_file(number)
        data = tensor.detach().cpu().contiguous()
        self._file.write(data.reshape(-1).view(torch.uint8).numpy())
        self._written += 1

    def file_name(self, number: int) -> str:
        """Name of a shard."""
        total = len(self.shards)
        return SINGLE_FILE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def _start_file(self, number: int) -> None:
        self._close_file()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in self.shards[number]:
            offsets = [offset, offset + spec.num_bytes]
            header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            offset += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / self.file_name(number)).open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write_index(self) -> None:
        weight_map = {spec.name: self.file_name(n) for n, shard in enumerate(self.shards) for spec in shard}
        total = sum(spec.num_bytes for spec in self.plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(plan: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in plan:
        if shards[-1] and used + spec.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.num_bytes
    return shards


def state_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Make the folder's config.json state the precision of its weights; left byte for byte where it already does."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        path.write_text(json.dumps({**config, key: name}, indent=2) + "\n")


def check_writable(path: Path, force: bool) -> None:
    """Refuse an output folder that exists, unless `force` says that it may be replaced."""
    if path.exists() and not force:
        raise SafetensorsError(f"{path} exists; choose another --out, or replace it with --force")
    if path.exists() and not path.is_dir():
        raise SafetensorsError(f"{path} is a file, not a folder; it is left alone, choose another --out")


@contextlib.contextmanager
def staged_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes when it does not.

    Raises SafetensorsError when `path` exists without `force`; with it, the old one stays until the new one is whole.
    """
    path = Path(path).absolute()
    check_writable(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    staging.mkdir()
    try:
        yield staging
        publish(staging, path, force)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, path: Path, force: bool) -> None:
    """Give a finished folder its name, replacing what was there only now and only with `force`."""
    check_writable(path, force)
    retired = path.parent / f"{staging.name}.replaced"
    if path.exists():
        path.rename(retired)
    try:
        staging.rename(path)
    except OSError:
        if retired.exists():
            retired.rename(path)
        raise
    shutil.rmtree(retired, ignore_errors=True)
