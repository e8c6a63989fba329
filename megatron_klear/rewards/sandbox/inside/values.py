"""Values as data: tagged JSON, written where programs run and read where their answers are judged.

None, True, False and integers up to 2**53 are themselves; everything else is a list of its tag and its content.
Types that have no tag are `["?", type name]`; they are read as Opaque, which equals nothing.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import Any

MAX_BYTES = 8 << 20
"""Longer values are not read."""
MAX_DEPTH = 100
"""What is nested deeper is no value."""
TOO_DEEP = "(nested too deep)"
_MOST_ALIKE = 64
"""Keys of one hash that a set or dict may have: of more, looking one up takes as long as there are many."""
_PLAIN_INTEGER = 1 << 53
_SEQUENCES: tuple[tuple[type, str], ...] = (
    (list, "l"),
    (tuple, "t"),
    (set, "S"),
    (frozenset, "F"),
    (collections.deque, "d"),
)
_MAKERS: dict[str, Callable[[Any], Any]] = {
    "l": list,
    "t": tuple,
    "S": set,
    "F": frozenset,
    "d": collections.deque,
}


PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range, list, tuple, set, frozenset, dict),
    collections.deque,
)


class Opaque:
    """A value that is no data. It equals nothing, itself neither, and is neither true nor false."""

    __slots__ = ("type_name",)

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} is neither true nor false")

    def __repr__(self) -> str:
        return f"<an object of type {self.type_name}>"


def unfit(value: Any) -> str | None:
    """Why a value does not cross as it is, None where it does."""
    waiting = [(value, 0)]
    while waiting:
        held, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} deep"
        if isinstance(held, dict):
            waiting += [(one, depth + 1) for entry in held.items() for one in entry]
        elif isinstance(held, list | tuple | set | frozenset | collections.deque):
            waiting += [(one, depth + 1) for one in held]
        elif not (held is None or isinstance(held, int | float | complex | str | bytes | bytearray | range)):
            return f"holds an object of type {type(held).__name__}, which is no data"
    size = len(encode(value))
    return (
        f"is {size / (1 << 20):.1f} MiB long as data, and {MAX_BYTES >> 20} are the most" if size > MAX_BYTES else None
    )


def encode(value: Any, foreign: Callable[[Any, int], Any] | None = None) -> bytes:
    """A value as bytes; what has no tag is given to `foreign` with its depth, or its type is named.

    With `foreign` a subclass of a plain type is no plain value either.
    """
    return json.dumps(to_json(value, foreign)).encode()


def encode_arguments(arguments: list[Any]) -> bytes:
    """The arguments of a call as bytes."""
    return encode(list(arguments))


def decode(content: bytes, foreign: Callable[[Any], Any] | None = None) -> Any:
    """The value that bytes say, whoever wrote them; Opaque where they say none. Raises nothing.

    `foreign` reads the content of the tag "@", which nothing else has.
    """
    if len(content) > MAX_BYTES:
        return Opaque("(longer than can be read)")
    try:
        read = json.loads(
            content, parse_int=_short_integer, parse_float=_refuse, parse_constant=_refuse, object_pairs_hook=_refuse
        )
        return from_json(read, foreign)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError, MemoryError):
        return Opaque("(not a value)")


def to_json(value: Any, foreign: Callable[[Any, int], Any] | None = None, depth: int = 0) -> Any:
    """A value as what json can write; subclasses of plain types count as their plain value."""
    if depth > MAX_DEPTH:
        return ["?", TOO_DEEP]
    if foreign is not None and type(value) not in PLAIN:
        return foreign(value, depth)
    return plain_json(value, foreign, depth)


def plain_json(value: Any, foreign: Callable[[Any, int], Any] | None = None, depth: int = 0) -> Any:
    """As `to_json`, for what is or inherits from a plain type; else its type is named."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        plain = int.__int__(value)
        return plain if -_PLAIN_INTEGER <= plain <= _PLAIN_INTEGER else ["i", f"{plain:x}"]
    if isinstance(value, float):
        return ["f", float.hex(value)]
    if isinstance(value, str):
        return ["s", str.__str__(value)]
    if isinstance(value, bytes | bytearray):
        return ["b" if isinstance(value, bytes) else "a", bytes(value).hex()]
    if isinstance(value, complex):
        return ["c", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, range):
        return ["r", [to_json(part) for part in (value.start, value.stop, value.step)]]
    for kind, tag in _SEQUENCES:
        if isinstance(value, kind):
            return [tag, [to_json(one, foreign, depth + 1) for one in kind.__iter__(value)]]  # type: ignore[attr-defined]
    if isinstance(value, dict):
        items = dict.items(value)
        return ["m", [[to_json(key, foreign, depth + 1), to_json(one, foreign, depth + 1)] for key, one in items]]
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return to_json(value.item(), foreign, depth + 1)
    return ["?", type(value).__name__]


def from_json(read: Any, foreign: Callable[[Any], Any] | None = None) -> Any:
    """The value that json read. Raises ValueError, TypeError and the like where it says none."""
    if read is None or isinstance(read, bool | int):
        return read
    tag, content, *rest = read
    if tag == "s" and isinstance(content, str):
        return content
    if tag == "f":
        return float.fromhex(content)
    if tag == "i":
        return int(content, 16)
    if tag in _MAKERS:
        entries = [from_json(one, foreign) for one in content]
        return _MAKERS[tag](_spread(entries) if tag in "SF" else entries)
    if tag == "m":
        keys = _spread([from_json(key, foreign) for key, _ in content])
        return dict(zip(keys, [from_json(one, foreign) for _, one in content], strict=True))
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "a":
        return bytearray.fromhex(content)
    if tag == "c":
        return complex(float.fromhex(content), float.fromhex(rest[0]))
    if tag == "r":
        return range(*map(from_json, content))
    if tag == "@" and foreign is not None:
        return foreign(content)
    if tag == "?":
        return Opaque(str(content)[:100])
    raise ValueError("not a value")


def _short_integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("integers of many digits are in hexadecimal")
    return int(digits)


def _spread(keys: list[Any]) -> list[Any]:
    """The keys, if a set of them takes no longer to make than one of others."""
    hashes = sorted(map(hash, keys))
    if any(first == last for first, last in zip(hashes, hashes[_MOST_ALIKE:], strict=False)):
        raise ValueError("keys that collide")
    return keys


def _refuse(_: object) -> Any:
    raise ValueError("no plain floats, and no objects")
