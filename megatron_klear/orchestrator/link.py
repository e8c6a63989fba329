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
        self._ahead = bytearray()  # what came while this end was sending
        # A fifth of it otherwise: more turns of the two ends.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK)

    def send(self, message: Any) -> None:
        """Hand a message over. Raises LinkClosedError."""
        head, beside = wire.taken_apart(message)
        sizes = [len(head), *(buffer.nbytes for buffer in beside)]
        try:
            self._write(memoryview(b"".join(_LENGTH.pack(number) for number in (len(sizes), *sizes)) + head))
            for buffer in beside:
                self._write(buffer)
        except OSError as error:
            raise LinkClosedError from error

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """The next message, or None where none begins in time. Raises LinkClosedError."""
        if not self._ahead and not self._events(select.POLLIN, timeout_seconds):
            return None
        (count,) = _LENGTH.unpack(self._read(_LENGTH.size))
        sizes = [length for (length,) in _LENGTH.iter_unpack(self._read(count * _LENGTH.size))]
        head, *beside = [self._read(size) for size in sizes]
        return wire.put_together(head, beside)

    def close(self) -> None:
        """Let go of this end, which the other hears of."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _write(self, content: memoryview) -> None:
        while len(content):
            try:
                content = content[self._socket.send(content, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                # The other end may be sending too, as news for people: if neither read, both would wait for ever.
                if self._events(select.POLLIN | select.POLLOUT) & select.POLLIN:
                    came = self._socket.recv(_CHUNK)
                    if not came:
                        raise LinkClosedError from None
                    self._ahead += came

    def _events(self, wanted: int, timeout_seconds: float | None = None) -> int:
        # Not select, which knows no descriptor above 1,023: rank 0 of a large world has more.
        poll = select.poll()
        poll.register(self._socket, wanted)
        return sum(events for _, events in poll.poll(None if timeout_seconds is None else timeout_seconds * 1000))

    def _read(self, size: int) -> memoryview:
        view = np.empty(size, np.uint8).data  # not a bytearray, which would first be filled with zeros
        done = min(size, len(self._ahead))
        view[:done] = self._ahead[:done]
        del self._ahead[:done]
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
