"""The emulated device from Python: the C interface of csrc/policy_loss.h, every call of it checked.

Before a call each array is declared with its exact extent, and what may be read and written of it; after it any fault
is raised. The structures are read from the header, so that they cannot differ from it.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emulator.build import CSRC

_KINDS = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float}
READ, WRITE = 0, 1


class EmulatedFault(AssertionError):
    """What the emulated device noticed; the message lists it."""


class CallError(RuntimeError):
    """A call returned an error; `code` is that of csrc/policy_loss.h or CUDA's."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(f"policy loss kernel: {words} ({code})")
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """In which order threads and blocks run and bulk copies arrive: each is one that the device may choose."""

    order: int = 0
    """0 forward, 1 backward, 2 at random."""
    copies: int = 1
    """0 at once, 1 when nothing else can go on, 2 at any time."""
    preempt: int = 0
    """Mean number of accesses after which a thread loses its turn; 0 never before it waits."""
    exp2_error: int = 0
    """0 exact to rounding; else off by the 2^-22 that PTX allows: 1 either way, 2 upwards, 3 downwards."""
    seed: int = 1


SCHEDULES = {
    "forward": Schedule(),
    "backward": Schedule(order=1, copies=0),
    "random": Schedule(order=2, copies=2, seed=5),
    "preempted": Schedule(order=2, copies=2, preempt=97, seed=11),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel that ran: the file of its launch, its shape, and bytes of shared memory a block."""

    file: str
    grid: int
    block: int
    cluster: int
    dynamic: int
    static: int
    resident: int
    """Blocks a multiprocessor of an H100, by shared memory."""


def _structures(header: str) -> dict[str, Any]:
    """The structures of a C header, by name."""
    found = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", header, re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for line in re.sub(r"//[^\n]*", "", body).split(";"):
            if match := re.match(r"\s*(?:const\s+)?(\w+)(\*?)\s+(\w+)\s*$", line):
                kind, pointer, field = match.groups()
                fields.append((field, ctypes.c_void_p if pointer else _KINDS[kind]))
            else:
                assert not line.strip(), f"a field of {name} of a form that is not known: {line}"
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


_HEADER = _structures((CSRC / "policy_loss.h").read_text())


class EmulatedDevice:
    """Stands in for the compiled module of kernels/extension.py, for CUDA's functions only."""

    Logits, Tokens = _HEADER["klear_logits"], _HEADER["klear_tokens"]
    Coefficients, Outputs = _HEADER["klear_coefficients"], _HEADER["klear_outputs"]

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        for name in ("emulated_fault", "emulated_launch", "klear_cuda_error_string", "klear_cuda_archs"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        self.lib.emulated_array.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64, *[ctypes.c_int] * 4]
        window = [ctypes.c_size_t, *[ctypes.c_uint64] * 3, ctypes.c_int, ctypes.c_void_p]
        self.lib.emulated_window.argtypes = window
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.lib.klear_cuda_combine.argtypes = [pointer, number, number, pointer, ctypes.c_int, pointer]
        self.lib.klear_cuda_mailbox_bytes.restype = number
        self.launches: list[Launch] = []
        """Of the last call."""
        self.owner = -1

    def schedule(self, schedule: Schedule) -> None:
        """How the following calls run."""
        s = schedule
        self.lib.emulated_schedule(s.order, s.copies, s.preempt, s.exp2_error, s.seed)

    def properties(self, major: int = 9, most_cluster: int = 8, refused_cluster: int = 9) -> None:
        """A device of compute capability `major`.

        Its occupancy query finds no room for clusters above `most_cluster` blocks, and launches of clusters of
        `refused_cluster` blocks or more fail for want of room.
        """
        self.lib.emulated_properties(major, most_cluster, refused_cluster)

    def plant(self, number: int) -> None:
        """Commit a fault of a library that was built from `planted.plant`; 0 for none."""
        self.lib.emulated_plant(number)

    def cuda_rows(
        self, logits: Any, tokens: Any, loss: Any, out: Any, row_kernel: int, device: int, stream: int
    ) -> None:
        """klear_cuda_rows."""
        self._declare(logits, tokens, out)
        self._call(self.lib.klear_cuda_rows, *map(ctypes.byref, (logits, tokens, loss, out)), row_kernel, device, None)

    def cuda_stats(self, logits: Any, tokens: Any, stats: int, device: int, stream: int) -> None:
        """klear_cuda_stats."""
        self._declare(logits, tokens, None)
        self._array("stats", stats, 16 * logits.rows, 4, write=True)
        self._call(self.lib.klear_cuda_stats, *map(ctypes.byref, (logits, tokens)), _pointer(stats), device, None)

    def cuda_combine(self, stats: int, ranks: int, rows: int, combined: int, device: int, stream: int) -> None:
        """klear_cuda_combine."""
        self.lib.emulated_reset()
        self.owner = -1
        self._array("stats", stats, 16 * ranks * rows, 4)
        self._array("combined", combined, 16 * rows, 4, write=True)
        self._call(self.lib.klear_cuda_combine, stats, ranks, rows, combined, device, None)

    def cuda_finish(
        self, logits: Any, tokens: Any, loss: Any, combined: int, out: Any, device: int, stream: int
    ) -> None:
        """klear_cuda_finish."""
        self._declare(logits, tokens, out)
        self._array("stats", combined, 16 * logits.rows, 4)
        structures = map(ctypes.byref, (logits, tokens, loss))
        self._call(
            self.lib.klear_cuda_finish, *structures, _pointer(combined), ctypes.byref(out), device, _pointer(stream)
        )

    @staticmethod
    def Peers(*, mailboxes: list[int], **fields: int) -> Any:
        """klear_peers."""
        addresses = (ctypes.c_int64 * len(mailboxes))(*mailboxes)
        peers = _HEADER["klear_peers"](
            mailboxes=ctypes.cast(addresses, ctypes.c_void_p), ranks=len(mailboxes), **fields
        )
        peers.kept = addresses
        return peers

    def cuda_sharded_fits(self, logits: Any, device: int) -> str:
        """klear_cuda_sharded_fits, in words."""
        code = self.lib.klear_cuda_sharded_fits(ctypes.byref(logits), device)
        return str(self.lib.klear_cuda_error_string(code).decode()) if code else ""

    def cuda_mailbox_bytes(self, ranks: int, capacity: int) -> int:
        """klear_cuda_mailbox_bytes."""
        return int(self.lib.klear_cuda_mailbox_bytes(ctypes.c_int64(ranks), ctypes.c_int64(capacity)))

    def _call(self, function: Any, *arguments: Any) -> None:
        self._finish(function(*arguments))

    def _finish(self, code: int) -> None:
        if not code:
            self.lib.emulated_check_complete()
        self.launches = [self._launch(i) for i in range(self.lib.emulated_launches())]
        faults = [self.lib.emulated_fault(i).decode() for i in range(self.lib.emulated_faults())]
        if faults:
            raise EmulatedFault("\n".join(faults))
        if code:
            words = self.lib.klear_cuda_error_string(code).decode() if code > 0 else "shapes, types or strides"
            raise CallError(code, words)

    def _launch(self, index: int) -> Launch:
        place, *pairs = self.lib.emulated_launch(index).decode().split()
        return Launch(place.split(":")[0], **{key: int(value) for key, value in (pair.split("=") for pair in pairs)})

    def _array(self, name: str, address: int | None, size: int, granule: int, write: bool = False) -> None:
        """An array without rows: all of it is read, or all of it is written."""
        if address and size:
            shift = granule.bit_length() - 1
            self.lib.emulated_array(name.encode(), address, size, shift, write, not write, write)
            self.lib.emulated_owner(self.owner, self.owner)
            self.lib.emulated_window(address, size, size, 1, WRITE if write else READ, None)

    def _declare(self, logits: Any, tokens: Any, out: Any | None, owner: int | None = None) -> None:
        """The arrays of a call. Those of device `owner` join those of other launches."""
        if owner is None:
            self.lib.emulated_reset()
        self.owner = -1 if owner is None else owner
        if logits.rows and logits.columns and logits.rows < 1 << 28:
            self._declare_rows(logits, tokens)
        for name, kind in self.Tokens._fields_:
            if kind is ctypes.c_void_p:
                self._array(name, getattr(tokens, name), logits.rows * (8 if name == "targets" else 4), 4)
        for name, _ in self.Outputs._fields_ if out is not None else ():
            size = 1 if name in ("region", "status") else 4
            self._array(name, getattr(out, name), logits.rows * size, size, write=True)

    def _declare_rows(self, logits: Any, tokens: Any) -> None:
        """The matrices, watched in granules of what one thread stores at a time. Rows without weight are not read."""
        width = -(-logits.columns // 8) * 8
        size, gradient_size = (2 if kind else 4 for kind in (logits.logits_type, logits.gradient_type))
        source = _Matrix(logits.logits, logits.logits_stride * size, width * size, logits.rows)
        target = _Matrix(logits.gradient, logits.gradient_stride * gradient_size, width * gradient_size, logits.rows)
        in_place, shift = logits.gradient == logits.logits, 3 if gradient_size < size else 4
        closed = _without_weight(tokens, logits.rows)
        if in_place and source.pitch > 4 * source.width:  # too far apart to watch what lies between: row by row
            for row in range(logits.rows):
                self._declare_matrices(source.row(row), target.row(row), True, shift, closed[row : row + 1])
        else:
            self._declare_matrices(source, target, in_place, shift, closed)

    def _declare_matrices(
        self, source: _Matrix, target: _Matrix, in_place: bool, shift: int, closed: np.ndarray
    ) -> None:
        self.lib.emulated_array(b"logits", source.address, source.extent, shift, in_place, 1, 0)
        self.lib.emulated_owner(self.owner, self.owner)
        self._window(source, READ, closed.ctypes.data)
        if target.address and not in_place:
            self.lib.emulated_array(b"gradient", target.address, target.extent, shift, 1, 0, 1)
            self.lib.emulated_owner(self.owner, self.owner)
        if target.address:
            self._window(target, WRITE, None)

    def _window(self, matrix: _Matrix, mode: int, closed: int | None) -> None:
        self.lib.emulated_window(matrix.address, matrix.pitch, matrix.width, matrix.rows, mode, closed)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Rows of `width` bytes that start `pitch` bytes apart."""

    address: int | None
    pitch: int
    width: int
    rows: int

    @property
    def extent(self) -> int:
        return (self.rows - 1) * self.pitch + self.width

    def row(self, index: int) -> _Matrix:
        return _Matrix((self.address or 0) + index * self.pitch, self.width, self.width, 1)


def _pointer(address: int | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _without_weight(tokens: Any, rows: int) -> np.ndarray:
    """[rows] uint8: 1 for those whose weights are all 0."""
    weights = [address for address in (tokens.policy_weights, tokens.nll_weights) if address]
    closed = np.full(rows, bool(weights))
    for address in weights:
        closed &= np.ctypeslib.as_array((ctypes.c_float * rows).from_address(address)) == 0
    return closed.astype(np.uint8)
