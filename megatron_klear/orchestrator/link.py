"""Messages between rank 0 and its orchestrator, over a pair of sockets that no other process can open.

A message is lengths, a pickle and the bytes of large arrays, from the memory of one process to that of the other. Both
ends are this program, and what a model wrote crosses as text and numbers; answers of grading processes, which run near
to such text, are JSON instead.
"""

from __future__ import annotations

import contextlib
import pickle
import select
import socket
import struct
from typing import Any

import numpy as np

from megatron_klear.distributed import wire

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20


class LinkClosedError(Exception):
    """The process at the other end is gone."""


class Link:
    """One end. Only one thread may use it."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK
        )  # a fifth of it otherwise: more turns of the two ends

    def send(self, message: Any) -> None:
        """Hand a message over. Raises LinkClosedError."""
        head, beside = wire.taken_apart(message)
        sizes = [len(head), *(buffer.nbytes for buffer in beside)]
        try:
            self._socket.sendall(b"".join(_LENGTH.pack(number) for number in (len(sizes), *sizes)) + head)
            for buffer in beside:
                self._socket.sendall(buffer)
        except OSError as error:
            raise LinkClosedError from error

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """The next message, or None where none begins in time. Raises LinkClosedError."""
        if not select.select([self._socket], [], [], timeout_seconds)[0]:
            return None
        (count,) = _LENGTH.unpack(self._read(_LENGTH.size))
        sizes = [length for (length,) in _LENGTH.iter_unpack(self._read(count * _LENGTH.size))]
        head, *beside = [self._read(size) for size in sizes]
        return wire.put_together(head, beside)

    def close(self) -> None:
        """Let go of this end, which the other hears of."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _read(self, size: int) -> memoryview:
        view, done = np.empty(size, np.uint8).data, 0  # not a bytearray, which would first be filled with zeros
        while done < size:
            try:
                count = self._socket.recv_into(view[done : done + _CHUNK])
            except OSError as error:
                raise LinkClosedError from error
            if not count:
                raise LinkClosedError
            done += count
        return view


def told(error: Exception, trace: str) -> Exception:
    """The error as it can cross: itself, where it survives the way, with its traceback as a note; else its words."""
    from megatron_klear.errors import UserError

    if not isinstance(error, UserError):
        error.add_note(f"in the orchestrator:\n{trace}")
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    return UserError(str(error)) if isinstance(error, UserError) else RuntimeError(f"{error!r}\n{trace}")
