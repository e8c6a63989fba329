"""Ground truths on disk: written once before a run, read one at a time by the process that grades with it.

    truths-DIGEST.jsonl    one line a problem: data_source, ground_truth, extra_info (forms of `plain`)
    truths-DIGEST.npy      int64 [problems + 1]: where each line begins, and the size of the file

The digest is that of the lines, so that a folder never holds the lines of one writing with the places of another, and
references to what was written before stay good.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .base import RewardError
from .plain import PlainError, from_json, to_json

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class TruthRef:
    """The place of a problem's ground truth and extra_info in a file, in bytes.

    Processes that grade must see the file under this path.
    """

    path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Truth:
    """What a row holds for its reward."""

    data_source: str
    ground_truth: Any
    extra_info: Any = None


class TruthReadError(Exception):
    """A ground truth that is not where a reference says; the message names the file."""


class TruthStore:
    """The references to all ground truths of a run, in the order of writing; holds none of them."""

    def __init__(self, path: Path, offsets: npt.NDArray[np.int64]) -> None:
        """`path` is the absolute path of the lines, `offsets` [problems + 1] where they begin."""
        self.path, self._offsets = path, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> TruthRef:
        """The reference to problem `number`, from 0. Raises IndexError past the last."""
        if not 0 <= number < len(self):
            raise IndexError(f"ground truth {number} of {len(self)}")
        begin, end = int(self._offsets[number]), int(self._offsets[number + 1])
        return TruthRef(str(self.path), begin, end - begin)

    def __iter__(self) -> Iterator[TruthRef]:
        return (self[number] for number in range(len(self)))

    @classmethod
    def write(
        cls,
        folder: Path,
        truths: Iterable[tuple[str, Any, Any]],
        *,
        place: Callable[[int], str] = lambda number: f"row {number + 1}",
    ) -> TruthStore:
        """Write (data_source, ground_truth, extra_info) of every problem; whole or not at all.

        `truths` is read once and one at a time. `place` names a row in errors, by its number from 0. The same problems
        written again are the same file. Raises RewardError for a value that has no form on disk.
        """
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".truths.{os.getpid()}.partial"
        digest, offsets = hashlib.blake2b(digest_size=_DIGEST_BYTES), [0]
        try:
            with unfinished.open("wb") as stream:
                for number, (data_source, ground_truth, extra_info) in enumerate(truths):
                    line = _line(data_source, ground_truth, extra_info, partial(place, number))
                    digest.update(line)
                    stream.write(line)
                    offsets.append(offsets[-1] + len(line))
                _sync(stream)
            path = folder / f"truths-{digest.hexdigest()}.jsonl"
            os.replace(unfinished, path)
            index = np.array(offsets, dtype=np.int64)
            with unfinished.open("wb") as stream:
                np.save(stream, index, allow_pickle=False)
                _sync(stream)
            os.replace(unfinished, path.with_suffix(".npy"))
        finally:
            unfinished.unlink(missing_ok=True)
        return cls(path, index)

    @classmethod
    def open(cls, path: Path) -> TruthStore:
        """A store that was written, by the path of its lines. Raises RewardError where it is incomplete."""
        path = path.resolve()
        try:
            offsets = np.load(path.with_suffix(".npy"), allow_pickle=False)
            size = path.stat().st_size
        except (OSError, ValueError) as error:
            raise RewardError(f"the ground truths of {path} cannot be read ({error}); start the run again") from None
        if offsets.dtype != np.int64 or offsets.ndim != 1 or offsets[:1].tolist() != [0] or offsets[-1] != size:
            raise RewardError(
                f"{path} has {size} bytes, and its index {path.with_suffix('.npy').name} speaks of another file; "
                "remove both and start the run again"
            )
        return cls(path, offsets)


def read_truth(ref: TruthRef, data_source: str) -> Truth:
    """The ground truth that a reference points to, of a problem of this `data_source`.

    Raises TruthReadError where it is not there: the file is missing or is another than was written.
    """
    try:
        descriptor = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = _pread(descriptor, ref.length, ref.offset)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        told = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise TruthReadError(
            f"the ground truth cannot be read from {ref.path}: {told}; every node that grades must see the folder "
            "under this path"
        ) from None
    words = f"{ref.path} holds no ground truth of {data_source!r} in its {ref.length} bytes from {ref.offset} on"
    if len(content) < ref.length or not content.endswith(b"\n"):
        raise TruthReadError(f"{words}: it was changed or cut since it was written")
    try:
        found = from_json(content)
        truth = Truth(found["data_source"], found["ground_truth"], found["extra_info"])
    except (PlainError, TypeError, KeyError) as error:
        raise TruthReadError(f"{words}: {error}") from None
    if truth.data_source != data_source:
        raise TruthReadError(f"{words}, but one of {truth.data_source!r}")
    return truth


def _line(data_source: str, ground_truth: Any, extra_info: Any, place: Callable[[], str]) -> bytes:
    row = {"data_source": data_source, "ground_truth": ground_truth, "extra_info": extra_info}
    try:
        return to_json(row) + b"\n"
    except PlainError as error:
        raise RewardError(f"{place()} (data_source {data_source!r}): {error}") from None


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes; fewer only at the end of the file. One call may give less than it is asked for."""
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(descriptor, length, offset)):
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return b"".join(parts)


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
