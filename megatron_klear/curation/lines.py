"""A file of JSON lines that only grows, for results that a killed command must not lose."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from megatron_klear.errors import UserError


class StoreError(UserError):
    """A file of results that is damaged, or that another process is using."""


class LineFile:
    """Lines are read at their places and added at the end; a context manager.

    A last line without its end was cut by a kill: it is not read, and the next one takes its place.
    """

    def __init__(self, path: Path) -> None:
        """Open or begin `path`. Raises StoreError where another process has it open."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise StoreError(f"another process is writing {path}; wait for it") from None
        self._size = 0

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._stream.close()

    def load(self, take: Callable[[int, dict[str, Any]], None]) -> None:
        """Give `take` every line's place and content; once, before anything else.

        Raises StoreError for a line that is no object, or for which `take` raises ValueError, TypeError or KeyError;
        the file is then closed.
        """
        self._stream.seek(0)
        for number, line in enumerate(self._stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line.decode("utf-8", "surrogatepass"))
                if not isinstance(content, dict):
                    raise ValueError("it is no object")
                take(self._size, content)
            except (ValueError, TypeError, KeyError) as error:
                self._stream.close()
                raise StoreError(f"{self.path}:{number} is damaged: {error}; remove the line") from None
            self._size += len(line)

    def read(self, place: int) -> Any:
        """The content of the line at a place."""
        self._stream.seek(place)
        return json.loads(self._stream.readline().decode("utf-8", "surrogatepass"))

    def add(self, contents: Iterable[Mapping[str, Any]], *, to_disk: bool = False) -> list[int]:
        """Write lines, which outlive this process, and with `to_disk` the machine; returns their places."""
        if self._stream.seek(0, os.SEEK_END) != self._size:
            self._stream.truncate(self._size)
        places = []
        for content in contents:
            line = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            places.append(self._size)
            self._stream.write(line)
            self._size += len(line)
        self._stream.flush()
        if to_disk:
            os.fsync(self._stream.fileno())
        return places
