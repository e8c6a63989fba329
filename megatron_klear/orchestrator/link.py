"""Messages between rank 0 and its orchestrator, over a pair of sockets that no other process can open.

A message is a length and a pickle, so that arrays cross as the bytes they are. Both ends are this program, and what a
model wrote crosses as text and numbers; answers of grading processes, which run near to such text, are JSON instead.
"""

from __future__ import annotations

import contextlib
import pickle
import select
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20


class LinkClosedError(Exception):
    """The process at the other end is gone."""


class Link:
    """One end. Only one thread may use it."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Any) -> None:
        """Hand a message over. Raises LinkClosedError."""
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            self._socket.sendall(_LENGTH.pack(len(content)))
            self._socket.sendall(content)
        except OSError as error:
            raise LinkClosedError from error

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """The next message, or None where none begins in time. Raises LinkClosedError."""
        if not select.select([self._socket], [], [], timeout_seconds)[0]:
            return None
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def close(self) -> None:
        """Let go of this end, which the other hears of."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _read(self, size: int) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            try:
                count = self._socket.recv_into(view[done : done + _CHUNK])
            except OSError as error:
                raise LinkClosedError from error
            if not count:
                raise LinkClosedError
            done += count
        return content


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
