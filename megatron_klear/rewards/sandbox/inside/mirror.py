"""Exceptions of the program, and its subclasses of plain types, as a trusted test has them: real ones of its own."""

from __future__ import annotations

import builtins
import collections
import sys
from typing import Any

from .proxy import ProgramError, Proxy, named

_UNSAFE = (StopIteration, StopAsyncIteration)
"""Raised into a test they would end its loops, all(...) among them, as if nothing were left to check."""
_KINDS = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, collections.deque)


class _Mirrored(type):
    """The class of exception classes that the program defines."""

    _proxy: Proxy

    def __call__(cls, *given: Any, **options: Any) -> Any:
        """An exception that the test makes: the program's own, made there."""
        proxy = cls._proxy
        if "_proxy" not in cls.__dict__:
            raise proxy._link.unsupported(f"a class of the test inherits from the program's {cls.__mro__[1].__name__}")
        return proxy(*given, **options)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return named(getattr(cls._proxy, name), name)


def proxy_of(value: Any) -> Proxy | None:
    """What stands for a value in the program, where it came from there."""
    if isinstance(value, Proxy):
        return value
    found = getattr(value, "_proxy", None) if isinstance(value, (_Mirrored, BaseException, *_KINDS)) else None
    return found if isinstance(found, Proxy) else None


class Mirrors:
    """Makes and keeps them."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self._classes: dict[int, type] = {}
        self._kinds = {kind.__name__: self._holding(kind) for kind in _KINDS}

    def plain(self, proxy: Proxy, value: Any) -> Any:
        """A plain value whose other attributes the program is asked for, such as a named tuple's."""
        held = self._kinds[type(value).__name__](value)
        held._proxy = proxy
        return held

    def error_class(self, told: Any) -> type[Exception]:
        """The class that a description names, which is this process's own where it is one of Python's."""
        number, name, module, bases = told
        place = builtins if module == "builtins" else None
        if place is None and str(module).partition(".")[0] in sys.stdlib_module_names - {"unittest", "__main__"}:
            place = sys.modules.get(module)
        found = getattr(place, name, None) if place is not None else None
        if isinstance(found, type):
            return found if issubclass(found, Exception) and not issubclass(found, _UNSAFE) else ProgramError
        if number not in self._classes:
            parents = tuple(dict.fromkeys(self.error_class(base) for base in bases)) or (ProgramError,)
            self._classes[number] = self._mirrored(int(number), str(name), parents)
        return self._classes[number]

    def error(self, told: Any, arguments: list[Any]) -> Exception:
        """An exception of the program."""
        number, described, words = told
        kind = self.error_class(described)
        if not isinstance(kind, _Mirrored) and kind is not ProgramError:
            try:
                made = kind(*arguments)
            except Exception:  # it wants something else
                made = None
            if type(made) is kind and str(made) == words:
                return made
            kind = _lasting(kind)
        if kind is ProgramError:
            return ProgramError(f"{described[1]}: {words}")
        error = Exception.__new__(kind)
        error.args = tuple(arguments)
        error._words, error._proxy = str(words), Proxy(self._link, int(number), str(described[1]))  # type: ignore[attr-defined]
        return error

    def _holding(self, kind: type) -> type:
        def attribute(held: Any, name: str) -> Any:
            if name.startswith("__") or name == "_proxy":
                raise AttributeError(name)
            return named(getattr(held._proxy, name), name)

        members: dict[str, Any] = {"__getattr__": attribute}
        if kind is dict:
            members["__missing__"] = lambda held, key: held._proxy[key]
        return type(kind.__name__, (kind,), members)

    def _mirrored(self, number: int, name: str, bases: tuple[type[Exception], ...]) -> type:
        members = {"__module__": "solution", "_proxy": Proxy(self._link, number, "type")}
        return _Mirrored(name, tuple(map(_lasting, bases)), members)


_LASTING: dict[type, type[Exception]] = {}


def _lasting(kind: type[Exception]) -> type[Exception]:
    """A subclass whose instances have the words that they were given."""
    if isinstance(kind, _Mirrored) or kind in _LASTING.values():
        return kind
    if kind not in _LASTING:
        members = {"__init__": lambda error, *given, **options: None, "__str__": _str, "__getattr__": _attribute}
        made: Any = _Mirrored(kind.__name__, (kind,), {**members, "__module__": kind.__module__})
        _LASTING[kind] = made
    return _LASTING[kind]


def _str(error: Any) -> str:
    return str(error.__dict__.get("_words", ""))


def _attribute(error: Any, name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return named(getattr(error._proxy, name), name)
