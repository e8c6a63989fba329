"""The untrusted end of a trusted test: calls come in as data, values go out as data."""

from __future__ import annotations

import itertools
import os
import struct
from typing import Any

from . import values

_LENGTH = struct.Struct("<I")


def send(descriptor: int, content: bytes) -> None:
    """One message. Raises OSError where the other end is gone."""
    view = memoryview(_LENGTH.pack(len(content)) + content)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> bytes:
    """The next message. Raises EOFError where the other end is gone."""
    (size,) = _LENGTH.unpack(_exactly(descriptor, _LENGTH.size))
    if size > values.MAX_BYTES:
        raise EOFError("a message is too long")
    return _exactly(descriptor, size)


def _exactly(descriptor: int, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = os.read(descriptor, min(missing, 1 << 20))
        if not part:
            raise EOFError("the other end is gone")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


class _Objects:
    """Objects that are no data stay here; the test holds their numbers."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}

    def encode(self, value: Any) -> Any:
        number = self.numbers.setdefault(id(value), len(self.kept))
        if number == len(self.kept):
            self.kept.append(value)
        return ["@", [number, type(value).__name__]]

    def decode(self, content: Any) -> Any:
        return self.kept[content[0]]


def answer_calls(descriptor: int, names: dict[str, Any], candidate: Any) -> None:
    """Serve a test until it closes its end."""
    objects = _Objects()
    send(descriptor, values.encode(sorted(name for name in names if not name.startswith("__"))))
    while True:
        try:
            content = receive(descriptor)
        except EOFError:
            return
        answer = _answer(values.decode(content, objects.decode), names, candidate)
        send(descriptor, values.encode(answer, objects.encode))


def _answer(asked: Any, names: dict[str, Any], candidate: Any) -> list[Any]:
    """What is asked for: ["value", it], of a call with its arguments as they are now; or ["raised", type, words]."""
    action, target, rest = asked[0], asked[1], asked[2:]
    try:
        if action == "name":
            return ["value", candidate if target is None else names[target]]
        if action == "attribute":
            return ["value", getattr(target, rest[0])]
        if action == "call":
            arguments, keywords = rest
            value = target(*arguments, **keywords)
            return ["value", value, arguments, keywords]
        if action == "iterator":
            return ["value", iter(target)]
        if action == "next":
            return ["value", list(itertools.islice(target, rest[0]))]
        if action == "length":
            return ["value", len(target)]
        if action == "item":
            return ["value", target[rest[0]]]
        if action == "text":
            return ["value", str(target) if rest[0] == "str" else repr(target)]
        return ["raised", "TypeError", f"nothing called {action}"]
    except Exception as error:
        return ["raised", _builtin_name(error), str(error)[:1000]]


def _builtin_name(error: Exception) -> str:
    """The type that Python has and the error is of."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
