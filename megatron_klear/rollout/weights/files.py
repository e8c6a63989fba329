"""Buckets of weights as safetensors files that appear whole, are read once and never stay behind.

Every run has a folder of its own, open to its user alone and locked while the run lives. What a killed run left is
known by its free lock and removed by the next run in the same place.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PREFIX = "megatron-klear-weights-"
_LOCK = ".lock"
# Room for the header, which comes first and is known last; about 1500 tensors. The rest is padded with blanks.
_HEADER_BYTES = 1 << 18
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class BucketFolder:
    """A private folder under `root` for the files of one run; `close` or the end of the process removes it."""

    def __init__(self, root: Path, *, durable: bool) -> None:
        """`durable` writes files through to the disk before they get their name. Removes what killed runs left."""
        self.durable = durable
        root.mkdir(parents=True, exist_ok=True)
        _remove_orphans(root)
        # Under a name that nobody takes for an orphan until it is locked.
        fresh = Path(tempfile.mkdtemp(prefix=".starting-" + _PREFIX, dir=root))
        self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = root / fresh.name.removeprefix(".starting-")
        fresh.rename(self.path)
        self._pid, self._count = os.getpid(), 0
        atexit.register(self.close)

    def new_bucket(self) -> Bucket:
        """An empty bucket, whose file has a name never used before: other hosts may remember an old one."""
        self._count += 1
        return Bucket(self.path / f"{self._count:08d}.safetensors", durable=self.durable)

    def close(self) -> None:
        """Remove the folder. Does nothing in a forked process."""
        if os.getpid() != self._pid or self._lock < 0:
            return
        atexit.unregister(self.close)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


class Bucket:
    """One file in the making: tensors are written as they come, the header last, then the file gets its name."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        """Nothing is written yet."""
        self.path, self.num_bytes = path, 0
        self._partial = path.with_suffix(".partial")
        self._durable = durable
        self._header: dict[str, Any] = {}
        self._header_bytes = 2
        self._file = self._partial.open("wb")
        self._file.seek(8 + _HEADER_BYTES)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._header)

    def has_room(self, name: str, tensor: Tensor, limit_bytes: int) -> bool:
        """Whether the tensor fits below the limit; an empty bucket takes any one tensor."""
        fits = self.num_bytes + tensor.nbytes <= limit_bytes
        return not self._header or (fits and self._header_bytes + _entry_bytes(name, tensor) <= _HEADER_BYTES)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. Raises OSError when the disk is full."""
        end = self.num_bytes + tensor.nbytes
        offsets = [self.num_bytes, end]
        self._header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._header_bytes += _entry_bytes(name, tensor)
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data)
        self.num_bytes = end

    def publish(self) -> Path:
        """Complete the file and give it its name."""
        text = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", _HEADER_BYTES) + text.ljust(_HEADER_BYTES))
        self._file.flush()
        if self._durable:
            os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)
        return self.path

    def remove(self) -> None:
        """Remove the file, whole or not."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _entry_bytes(name: str, tensor: Tensor) -> int:
    """Bound on what a tensor adds to the header."""
    return len(json.dumps(name)) + 24 * tensor.dim() + 120


def _remove_orphans(root: Path) -> None:
    """Remove folders of this user's runs whose process is gone."""
    for folder in root.glob(_PREFIX + "*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # locked: its run is alive
        finally:
            os.close(lock)
