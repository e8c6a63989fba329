"""Sequences of tokens in two files, `.bin` and `.idx`, in the format of Megatron-Core's IndexedDataset.

The layout is that of `megatron.core.datasets.indexed_dataset`, so that Megatron's own tools read what is written here:
.bin holds the tokens of all sequences end to end; .idx is a header, the number of sequences and of documents, the
length of each sequence (int32), its byte offset in .bin (int64), and the first sequence of each document (int64), with
one sequence to a document here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_INT32 = 4
_HEADER = struct.Struct("<9sQBQQ")


class IndexedWriter:
    """Writes int32 sequences to `prefix.bin` as they come, and `prefix.idx` on `close`."""

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        self._bin = _with_suffix(prefix, ".bin").open("wb")
        self._lengths: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()

    def append(self, tokens: npt.NDArray[np.int32]) -> None:
        """Add one sequence [n] of tokens."""
        self._bin.write(np.ascontiguousarray(tokens, dtype="<i4").data)
        self._lengths.append(len(tokens))

    def close(self) -> None:
        """Finish both files."""
        self._bin.close()
        lengths = np.array(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= lengths.itemsize
        with _with_suffix(self._prefix, ".idx").open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, _VERSION, _INT32, len(lengths), len(lengths) + 1))
            stream.write(lengths.tobytes())
            stream.write(pointers.tobytes())
            stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


class IndexedReader:
    """Reads `prefix.bin` and `prefix.idx` through memory maps: opening costs nothing, tokens are read when asked for.

    Raises ValueError naming the file where the two are not such a pair or one is cut short.
    """

    def __init__(self, prefix: Path) -> None:
        index_path, data_path = _with_suffix(prefix, ".idx"), _with_suffix(prefix, ".bin")
        index = np.memmap(index_path, mode="r", dtype=np.uint8)
        if len(index) < _HEADER.size:
            raise ValueError(f"{index_path} is cut short")
        magic, version, code, sequences, documents = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != _VERSION or code not in _DTYPES:
            raise ValueError(f"{index_path} is not an IndexedDataset index")
        if len(index) < _HEADER.size + 12 * sequences + 8 * documents:
            raise ValueError(f"{index_path} is cut short")
        self.lengths: npt.NDArray[np.int32] = np.frombuffer(index, "<i4", sequences, _HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", sequences, _HEADER.size + 4 * sequences)
        dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
        size = data_path.stat().st_size
        expected = int(self._pointers[-1]) + int(self.lengths[-1]) * dtype.itemsize if sequences else 0
        if size < expected:
            raise ValueError(f"{data_path} has {size} bytes, its index asks for {expected}: it is cut short")
        self._data = np.memmap(data_path, mode="r", dtype=dtype) if size else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.integer]:
        """Tokens [n] of a sequence, a view of the map."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sequence {index} of {len(self.lengths)}")
        start = int(self._pointers[index]) // self._data.itemsize
        return self._data[start : start + int(self.lengths[index])]


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
