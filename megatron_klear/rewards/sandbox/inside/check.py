"""The trusted end of a trusted test: what it calls are proxies, what it gets is data."""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Iterator
from typing import Any

from . import link, values

_UNSAFE = (StopIteration, StopAsyncIteration)
"""Raised into a test they would end its loops, all(...) among them, as if nothing were left to check."""


_ASKED_OF_MODULES = frozenset(("setUpModule", "tearDownModule"))
_MOST_ITEMS = 1024
"""Of an iterator, asked for at once."""


class ProgramError(RuntimeError):
    """The program raised something that the test cannot be given."""


class ProgramGone(BaseException):
    """The program's process has ended, or what it says is no answer."""


class _Link:
    """Asks the program's process, one question at a time."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        names = self._receive()
        self.names = set(names) if isinstance(names, list) and all(isinstance(one, str) for one in names) else set()

    def ask(self, *question: Any) -> list[Any]:
        """The value that is asked for, and, of a call, its arguments as they are afterwards."""
        content = values.encode(list(question), _numbered)
        try:
            link.send(self.descriptor, content)
        except OSError as error:
            raise ProgramGone(f"the program has ended ({error.strerror})") from None
        answer = self._receive()
        if not isinstance(answer, list) or not answer or answer[0] not in ("value", "raised"):
            raise ProgramGone("the program's process gave no answer")
        if answer[0] == "raised":
            raise _error(answer)
        return answer[1:]

    def _receive(self) -> Any:
        try:
            return values.decode(link.receive(self.descriptor), self._proxy)
        except (EOFError, OSError):
            raise ProgramGone("the program has ended") from None

    def _proxy(self, content: Any) -> Proxy:
        number, type_name = content
        return Proxy(self, int(number), str(type_name)[:100])


class Proxy:
    """An object of the program's process: functions, classes and their instances.

    It can be called, has attributes, items and a length, which come as data or as proxies. It has no comparisons and no
    arithmetic: what the program's own `__eq__` says decides no test.
    """

    __slots__ = ("_link", "_number", "_type_name")

    def __init__(self, to: _Link, number: int, type_name: str) -> None:
        self._link, self._number, self._type_name = to, number, type_name

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        given = list(arguments)
        value, *after = self._link.ask("call", self, given, keywords)
        if len(after) == 2:
            _update(given, after[0])
            _update(keywords, after[1])
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("attribute", self, name)[0]

    def __iter__(self) -> Iterator[Any]:
        iterator, count = self._link.ask("iterator", self)[0], 1
        while True:
            items = self._link.ask("next", iterator, count)[0]
            if not isinstance(items, list):
                raise ProgramGone("the program's process gave no items")
            yield from items
            if len(items) < count:
                return
            count = min(2 * count, _MOST_ITEMS)

    def __next__(self) -> Any:
        items = self._link.ask("next", self, 1)[0]
        if not isinstance(items, list) or len(items) != 1:
            raise ProgramError("the program's iterator is at its end")  # StopIteration: see _UNSAFE
        return items[0]

    def __len__(self) -> int:
        return int(self._link.ask("length", self)[0])

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("item", self, key)[0]

    def __str__(self) -> str:
        return str(self._link.ask("text", self, "str")[0])

    def __repr__(self) -> str:
        return f"<{self._type_name} of the program>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proxy) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} is neither true nor false")


def _numbered(value: Any) -> Any:
    if isinstance(value, Proxy):
        return ["@", [value._number, value._type_name]]
    raise TypeError(f"a test cannot hand over an object of type {type(value).__name__}: it is no data")


def _error(answer: list[Any]) -> Exception:
    name, words = str(answer[1]), str(answer[2]) if len(answer) > 2 else ""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _UNSAFE):
        try:
            made = kind(words)
            return made if isinstance(made, Exception) else ProgramError(words)
        except TypeError:  # such as UnicodeDecodeError, which wants more
            pass
    return ProgramError(f"{name}: {words}")


def _update(mine: Any, theirs: Any) -> None:
    """Carry changes of lists, dicts, sets and byte arrays into the test's own."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list):
        for index in range(min(len(mine), len(theirs))):
            mine[index] = _merged(mine[index], theirs[index])
        mine[len(theirs) :] = theirs[len(mine) :]
    elif isinstance(mine, dict):
        for key in [key for key in mine if key not in theirs]:
            del mine[key]
        for key, value in theirs.items():
            mine[key] = _merged(mine[key], value) if key in mine else value
    elif isinstance(mine, set):
        mine.intersection_update(theirs)
        mine.update(theirs)
    elif isinstance(mine, bytearray):
        mine[:] = theirs


def _merged(mine: Any, theirs: Any) -> Any:
    """The test's own object, changed, where it can be; else the new value."""
    if type(mine) is type(theirs) and isinstance(mine, list | dict | set | bytearray):
        _update(mine, theirs)
        return mine
    return mine if isinstance(mine, Proxy) and mine == theirs else theirs


class _Names(dict[str, Any]):
    """A test's names: its own, Python's, then the program's."""

    program: _Link

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) or name not in self.program.names:
            raise KeyError(name)
        return self.program.ask("name", name)[0]

    def of_module(self, name: str) -> Any:
        """What `from solution import name` gives."""
        if name in _ASKED_OF_MODULES or name.startswith("__"):
            raise AttributeError(name)
        if name not in self.program.names:
            raise NameError(f"the program defines no {name!r}")
        return self.program.ask("name", name)[0]


def checking_names(descriptor: int, names: dict[str, Any], entry: str) -> dict[str, Any]:
    """What a test's source is executed with; `solution` can be imported as well."""
    program = _Link(descriptor)
    found = _Names(names)
    found.program = program
    if entry:
        found["candidate"] = program.ask("name", None)[0]
        if entry in program.names:
            found[entry] = found["candidate"]
    module = types.ModuleType("solution")
    module.__dict__["__getattr__"] = found.of_module
    module.__dict__["__all__"] = []  # what the test does not define is the program's anyway; nothing hides abs or math
    sys.modules["solution"] = module
    return found
