"""Objects of the program as a trusted test has them: what is done with them is done there, data comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

_MOST_ITEMS = 1024
"""Of an iterator, asked for at once."""
_TOLD = ("__name__", "__qualname__", "__annotations__")


class ProgramError(RuntimeError):
    """The program did something that the test cannot be given."""


class ProgramGone(BaseException):
    """The program's process has ended, or what it says is no answer."""


class Unsupported(BaseException):
    """The test does what cannot be done across two processes; the program has no part in it."""


class Proxy:
    """An object of the program's process: a function, a class, an instance.

    Two of them are compared and added as the program says. With data it is asked only of what the test itself has made
    of a class, `Money(5) + 3`: else whatever a function returns could have an `__eq__` or `__sub__` that says yes to
    the value that is expected. What is a class the test's own source says.
    """

    __slots__ = ("_link", "_made", "_name", "_number", "_type_name")

    def __init__(self, link: Any, number: int, type_name: str) -> None:
        for name, value in (("_link", link), ("_number", number), ("_type_name", type_name)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_name", "")
        object.__setattr__(self, "_made", False)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        given = list(arguments)
        value, *after = self._link.ask("call", self, given, keywords)
        if len(after) == 2:
            update(given, after[0])
            update(keywords, after[1])
        return self._making(value) if self._type_name == "type" and self._name in self._link.classes else value

    def _do(self, operation: str, *given: Any) -> Any:
        return self._link.ask("do", operation, self, *given)[0]

    def _making(self, value: Any) -> Any:
        if isinstance(value, Proxy):
            object.__setattr__(value, "_made", True)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _TOLD:
            raise AttributeError(name)
        return named(self._do("getattr", name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._do("delattr", name)

    def __iter__(self) -> Iterator[Any]:
        iterator, count = self._do("iter"), 1
        if not isinstance(iterator, Proxy):
            raise ProgramError(f"{self!r} gave no iterator")
        while True:
            items = iterator._items(count)
            yield from items
            if len(items) < count:
                return
            count = min(2 * count, _MOST_ITEMS)

    def _items(self, count: int) -> list[Any]:
        items = self._do("next", count)
        if not isinstance(items, list) or len(items) > count:
            raise ProgramGone("the program's process gave no items")
        return items

    def __next__(self) -> Any:
        items = self._items(1)
        if not items:
            raise ProgramError("the program's iterator is at its end")  # StopIteration would end a loop of the test
        return items[0]

    def __reversed__(self) -> Iterator[Any]:
        return iter(self._do("reversed"))

    def __contains__(self, item: Any) -> bool:
        if self._made or isinstance(item, Proxy):
            return bool(self._do("contains", item))
        return any(entry == item for entry in self)

    def __getitem__(self, key: Any) -> Any:
        return self._do("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._do("delitem", key)

    def __repr__(self) -> str:
        return str(self._do("repr"))

    def __format__(self, how: str) -> str:
        return str(self._do("format", how))

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Proxy) and bool(self._link.ask("do", "isinstance", value, self)[0])

    def __subclasscheck__(self, kind: Any) -> bool:
        return isinstance(kind, Proxy) and bool(self._link.ask("do", "issubclass", kind, self)[0])

    def __mro_entries__(self, bases: Any) -> Any:
        raise self._link.unsupported(f"a class of the test inherits from the program's {self._name or self._type_name}")

    def __enter__(self) -> Any:
        return self._making(self._do("enter")) if self._made else self._do("enter")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return self._left("exit", error)

    async def __aenter__(self) -> Any:
        return self._making(self._do("aenter")) if self._made else self._do("aenter")

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return self._left("aexit", error)

    def _left(self, operation: str, error: Any) -> bool:
        """Leave a `with` of the program: it may take an exception away, but no failure of the test."""
        fails = self._link.fails(error)
        taken = bool(self._do(operation, error if isinstance(error, Exception) else None))
        return taken and isinstance(error, Exception) and not fails

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self._do("await")

    async def __aiter__(self) -> AsyncIterator[Any]:
        iterator = self._do("aiter")
        while items := self._link.ask("do", "anext", iterator)[0]:
            yield items[0]

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, bool):
            return False
        self._compared(other)
        same = self is other or (isinstance(other, Proxy) and other._number == self._number)
        return same or (bool(self._do("eq", other)) and not self._equals_all())

    def _equals_all(self) -> bool:
        try:
            return bool(self._do("eq", STRANGER))
        except Exception:  # an `__eq__` that takes its own kind alone: `self.x == other.x`
            return False

    def __ne__(self, other: object) -> bool:
        if other is None or isinstance(other, bool):
            return True
        self._compared(other)
        return bool(self._do("ne", other))

    def __hash__(self) -> int:
        return int(self._do("hash"))

    def _compared(self, other: Any) -> None:
        """Raise TypeError where a value that is expected would be the program's to compare."""
        if not (self._made or isinstance(other, Proxy)):
            raise TypeError(
                f"an object of the program ({self._type_name}) is no data: its operators decide nothing here"
            )


STRANGER = object()
"""What nothing of the program may be equal to."""


def named(value: Any, name: str) -> Any:
    """A value that the test has got by a name."""
    if isinstance(value, Proxy):
        object.__setattr__(value, "_name", name)
    return value


def _binary(name: str) -> Callable[[Proxy, Any], Any]:
    def operate(self: Proxy, other: Any) -> Any:
        self._compared(other)
        return self._making(self._do(name, other)) if self._made else self._do(name, other)

    return operate


def _reflected(name: str) -> Callable[[Proxy, Any], Any]:
    def operate(self: Proxy, other: Any) -> Any:
        self._compared(other)
        value = self._link.ask("do", name, other, self)[0]
        return self._making(value) if self._made else value

    return operate


def _changing(name: str) -> Callable[[Proxy, Any], Any]:
    operate = _binary(name)

    def change(self: Proxy, other: Any) -> Any:
        value = operate(self, other)
        return self if isinstance(value, Proxy) and value._number == self._number else value

    return change


def _ordered(name: str, opposite: str) -> Callable[[Proxy, Any], bool]:
    def compare(self: Proxy, other: Any) -> bool:
        self._compared(other)
        return bool(self._do(name, other)) and not self._do(opposite, other)

    return compare


def _single(name: str, *, of_class: bool) -> Callable[..., Any]:
    def operate(self: Proxy, *given: Any) -> Any:
        value = self._do(name, *given)
        return self._making(value) if self._made and of_class else value

    return operate


def _fill() -> None:
    """Give the class the operators that are all alike."""
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift"):
        setattr(Proxy, f"__{name}__", _binary(name))
        setattr(Proxy, f"__r{name}__", _reflected(name))
        setattr(Proxy, f"__i{name}__", _changing(f"i{name}"))
    for name in ("and", "or", "xor"):
        written = name if name == "xor" else f"{name}_"
        setattr(Proxy, f"__{name}__", _binary(written))
        setattr(Proxy, f"__r{name}__", _reflected(written))
        setattr(Proxy, f"__i{name}__", _changing(f"i{name}"))
    for name, opposite in (("lt", "gt"), ("gt", "lt")):
        setattr(Proxy, f"__{name}__", _ordered(name, opposite))
    for name in ("le", "ge", "divmod"):
        setattr(Proxy, f"__{name}__", _binary(name))
    for name in ("neg", "pos", "invert"):
        setattr(Proxy, f"__{name}__", _single(name, of_class=True))
    for name in ("abs", "round", "floor", "ceil", "trunc"):
        setattr(Proxy, f"__{name}__", _single(name, of_class=False))  # most often a number, which is data
    for kind in (int, float, complex, bool, str):
        setattr(Proxy, f"__{kind.__name__}__", _converting(kind.__name__, kind))
    for name in ("len", "index"):
        setattr(Proxy, f"__{name}__", _converting(name, int))


def _converting(name: str, kind: Callable[[Any], Any]) -> Callable[[Proxy], Any]:
    return lambda self: kind(self._do(name))


_fill()


def update(mine: Any, theirs: Any) -> None:
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
        update(mine, theirs)
        return mine
    if isinstance(mine, Proxy) and isinstance(theirs, Proxy) and mine._number == theirs._number:
        return mine
    return theirs if type(theirs) in _REPLACED or isinstance(theirs, Proxy) else mine


_REPLACED = (type(None), bool, int, float, complex, str, bytes, range, tuple, frozenset, list, dict, set, bytearray)
