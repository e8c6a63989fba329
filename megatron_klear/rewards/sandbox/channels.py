"""A program's descriptors: files in memory that the outside makes, fills and reads."""

from __future__ import annotations

import os
from types import TracebackType

from .outcome import Limits

_STDERR_BYTES = 64 << 10
SOURCE, STDIN, STDOUT, STDERR, RESULT = range(5)


class Channels:
    """The source and the four streams of one program.

    The program holds descriptors of its own on the same files: what it does to theirs, flags and positions, is not
    seen here. Their content is its own.
    """

    def __init__(self, source: bytes) -> None:
        self.theirs: list[int] = []
        self._ours: list[int] = []
        try:
            for name in ("source", "stdin", "stdout", "stderr", "result"):
                self.theirs.append(os.memfd_create(name))
                self._ours.append(os.open(f"/proc/self/fd/{self.theirs[-1]}", os.O_RDWR | os.O_CLOEXEC))
            _fill(self._ours[SOURCE], source)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> Channels:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def begin(self, stdin: bytes) -> None:
        """Empty the answers of the last test and put the input of the next. Raises OSError."""
        for descriptor in self._ours[STDIN:]:
            os.ftruncate(descriptor, 0)
        _fill(self._ours[STDIN], stdin)

    def answers(self, limits: Limits) -> tuple[bytes, bytes, bytes]:
        """Standard output, the end of standard error, and the returned value, up to the limit on output."""
        stdout, stderr, result = self._ours[STDOUT:]
        most = limits.output_bytes
        return _content(stdout, most), _content(stderr, most)[-_STDERR_BYTES:], _content(result, most)

    def close_theirs(self) -> None:
        """Once they are sent."""
        while self.theirs:
            os.close(self.theirs.pop())

    def close(self) -> None:
        """Give the memory back, once the program is gone too."""
        self.close_theirs()
        while self._ours:
            os.close(self._ours.pop())


def _content(descriptor: int, most: int) -> bytes:
    return os.pread(descriptor, min(os.fstat(descriptor).st_size, most), 0)


def _fill(descriptor: int, content: bytes) -> None:
    view, position = memoryview(content), 0
    while position < len(view):
        position += os.pwrite(descriptor, view[position:], position)
