"""The untrusted end of a trusted test: what is asked comes in as data, what is given goes out as data."""

from __future__ import annotations

import builtins
import importlib
import io
import itertools
import math
import operator
import os
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

from . import values

_LENGTH = struct.Struct("<I")
_MOST_PRINTED = 1 << 20


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


_PARTS: dict[str, str] = {
    "date": "year month day",
    "datetime": "year month day hour minute second microsecond",
    "time": "hour minute second microsecond",
    "timedelta": "days seconds microseconds",
    "Fraction": "numerator denominator",
}
_HOMES = {
    **dict.fromkeys(("date", "datetime", "time", "timedelta"), "datetime"),
    "Fraction": "fractions",
    "Decimal": "decimal",
}


def standard(value: Any) -> list[Any] | None:
    """The content of the tag "@" for a date, a time or a number of the library that has no tag of its own."""
    name = type(value).__name__
    if _HOMES.get(name, "") != type(value).__module__ or getattr(value, "tzinfo", None) is not None:
        return None
    parts = [getattr(value, part) for part in _PARTS[name].split()] if name in _PARTS else [str(value)]
    return ["standard", name, values.to_json(parts)]


def read_standard(content: Any) -> Any:
    """What `standard` wrote."""
    kind = getattr(importlib.import_module(_HOMES[content[1]]), content[1])  # few programs use them: not loaded ahead
    return kind(*values.from_json(content[2]))


def _exit(target: Any, words: Any) -> bool:
    """Leave a `with`: with no exception, or with one."""
    error = words
    return bool(type(target).__exit__(target, None if error is None else type(error), error, None))


_loop: Any = None


def _await(target: Any) -> Any:
    """Run a coroutine to its end, in one loop for all of them."""
    import asyncio

    global _loop
    _loop = _loop or asyncio.new_event_loop()

    async def awaited() -> Any:
        return await target

    return _loop.run_until_complete(awaited())


def _next_awaited(iterator: Any) -> list[Any]:
    try:
        return [_await(iterator.__anext__())]
    except StopAsyncIteration:
        return []


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift"),
            *("rshift", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior"),
            *("ixor", "ilshift", "irshift", "eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "invert", "abs"),
            *("index", "getitem", "setitem", "delitem", "contains"),
        )
    },
    **{
        function.__name__: function
        for function in (
            *(hash, bool, int, float, complex, round, len, str, repr, format, iter, reversed, isinstance, issubclass),
            *(getattr, setattr, delattr, divmod),
        )
    },
    **{name: getattr(math, name) for name in ("floor", "ceil", "trunc")},
    "next": lambda iterator, count: list(itertools.islice(iterator, count)),
    "enter": lambda target: type(target).__enter__(target),
    "exit": _exit,
    "await": _await,
    "aenter": lambda target: _await(type(target).__aenter__(target)),
    "aexit": lambda target, error: _await(type(target).__aexit__(target, error and type(error), error, None)),
    "aiter": lambda target: target.__aiter__(),
    "anext": _next_awaited,
}


class _Objects:
    """Objects that are no data stay here; the test holds their numbers."""

    def __init__(self, descriptor: int, names: dict[str, Any], candidate: Any) -> None:
        self.descriptor, self.names, self.candidate = descriptor, names, candidate
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.functions: dict[int, Any] = {}
        """Of the test, which the program was given."""
        self.stubs: dict[int, int] = {}
        self.printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)

    def encode(self, value: Any, depth: int) -> Any:
        """What stands for an object in a message."""
        if (found := standard(value)) is not None:
            return ["@", found]
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            return values.plain_json(value)
        if id(value) in self.stubs:
            return ["@", ["function", self.stubs[id(value)]]]
        number, name = self._number(value), type(value).__name__
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["@", ["class", self._class(value)]]
        if isinstance(value, BaseException):
            told = [values.to_json(one, self.encode, depth + 1) for one in value.args]
            return ["@", ["error", number, self._class(type(value)), _words(value), told]]
        if isinstance(value, values.PLAIN):
            return ["@", ["plain", number, name, values.plain_json(value, self.encode, depth)]]
        kind = (
            "coroutine" if isinstance(value, types.CoroutineType) else "type" if isinstance(value, type) else "object"
        )
        return ["@", [kind, number, name]]

    def decode(self, content: Any) -> Any:
        """The object that a test's message names."""
        kind: str = content[0]
        held: Any = content[1] if len(content) > 1 else None
        if kind == "object":
            return self.kept[held]
        if kind == "builtin":
            return getattr(builtins, held)
        if kind == "error":
            return getattr(builtins, held)(*values.from_json(content[2], self.decode))
        if kind == "slice":
            return slice(*values.from_json(held, self.decode))
        if kind == "iterator":
            return iter(values.from_json(held, self.decode))
        if kind == "function":
            if held not in self.functions:
                self.functions[held] = lambda *given, **named: self._call_back(held, given, named)
                self.stubs[id(self.functions[held])] = held
            return self.functions[held]
        return object() if kind == "stranger" else read_standard(content)

    def serve(self) -> Any:
        """Answer questions until what a function of the test gave is told, or the test is at its end (EOFError)."""
        while True:
            asked = values.decode(receive(self.descriptor), self.decode)
            if asked[0] == "given":
                return asked[1]
            if asked[0] == "thrown":
                raise asked[1]
            answer = self._answer(asked)
            send(self.descriptor, values.encode([self._taken(), *answer], self.encode))

    def _number(self, value: Any) -> int:
        number = self.numbers.setdefault(id(value), len(self.kept))
        if number == len(self.kept):
            self.kept.append(value)
        return number

    def _class(self, kind: type) -> list[Any]:
        bases = [self._class(base) for base in kind.__bases__ if issubclass(base, BaseException)]
        return [self._number(kind), kind.__name__, kind.__module__, bases if kind.__module__ != "builtins" else []]

    def _call_back(self, number: int, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        send(self.descriptor, values.encode([self._taken(), "function", number, list(given), named], self.encode))
        return self.serve()

    def _taken(self) -> str:
        """What the program has printed since the last message."""
        buffer = self.printed.buffer
        assert isinstance(buffer, io.BytesIO)
        text = buffer.getvalue()[:_MOST_PRINTED].decode("utf-8", "replace")
        buffer.seek(0)
        buffer.truncate()
        return text

    def _answer(self, asked: Any) -> list[Any]:
        """What is asked for: ["value", it], of a call with its arguments as they are now; or ["raised", error]."""
        action, target, rest = asked[0], asked[1], asked[2:]
        try:
            if action == "name":
                return ["value", self.candidate if target is None else self.names[target]]
            if action == "call":
                arguments, keywords = rest
                value = target(*arguments, **keywords)
                return ["value", value, arguments, keywords]
            return ["value", OPERATIONS[target](*rest)]
        except Exception as error:
            return ["raised", error]


def answer_calls(descriptor: int, names: dict[str, Any], candidate: Any) -> None:
    """Serve a test until it closes its end."""
    objects = _Objects(descriptor, names, candidate)
    send(descriptor, values.encode(sorted(name for name in names if not name.startswith("__"))))
    sys.stdout = objects.printed
    try:
        objects.serve()
    except EOFError:
        return


def _words(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return ""
