"""Values of a problem's row as JSON text, each of its own type again when read.

What JSON knows is written as it is. All else that data files hold is an object with the one key `"$"`, whose value
begins with the name of the kind:

    float("nan"), infinities   {"$": ["float", "nan"]}
    b"ab"                      {"$": ["bytes", "YWI="]}          base64
    (1, 2)                     {"$": ["tuple", 1, 2]}
    {1: "a"}, {"$": 1}         {"$": ["dict", [1, "a"]]}         keys that are no text, or would be taken for a kind
    np.float32(0.1)            {"$": ["scalar", "<f4", [], "zczMPQ=="]}    dtype, shape, base64 of its bytes
    np.zeros(1, np.int8)       {"$": ["array", "|i1", [1], "AA=="]}
    datetime, date, time       {"$": ["datetime", "2026-01-31T12:00:00"]}
    Decimal("0.10")            {"$": ["decimal", "0.10"]}
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

_KIND = "$"
_TEXTS: dict[type, tuple[str, Callable[[Any], str]]] = {
    datetime: ("datetime", datetime.isoformat),
    date: ("date", date.isoformat),
    time: ("time", time.isoformat),
    Decimal: ("decimal", str),
    bytes: ("bytes", lambda value: base64.b64encode(value).decode()),
}
_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "decimal": Decimal,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "float": float,
}
_SHOWN = 40


class PlainError(ValueError):
    """A value that has no form as JSON text, or a text that is the form of none."""


def to_json(value: Any) -> bytes:
    """A value as JSON in utf-8, without a line break. Raises PlainError that says where in it something has no form."""
    try:
        text = json.dumps(_encode(value, ""), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise PlainError("it is nested too deep, or holds itself") from None
    except ValueError as error:  # an integer of more digits than Python writes; PlainError is one, too
        raise error if isinstance(error, PlainError) else PlainError(str(error)) from None
    return text.encode("utf-8", "surrogatepass")


def from_json(content: bytes) -> Any:
    """The value of `to_json`'s bytes. Raises PlainError for other bytes."""
    try:
        return _decode(json.loads(content.decode("utf-8", "surrogatepass")))
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise PlainError(f"no value written as JSON ({type(error).__name__}: {error})") from None


def _encode(value: Any, where: str) -> Any:
    # Exact types: a subclass, numpy's float64 among them, would come back as its base.
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {_KIND: ["float", str(value)]}
    if kind is list:
        return [_encode(entry, f"{where}[{number}]") for number, entry in enumerate(value)]
    if kind is dict:
        return _encode_dict(value, where)
    if kind is tuple:
        return {_KIND: ["tuple", *(_encode(entry, f"{where}[{number}]") for number, entry in enumerate(value))]}
    if kind in _TEXTS:
        name, text = _TEXTS[kind]
        return {_KIND: [name, text(value)]}
    if kind.__module__ == "numpy" and (form := _encode_numpy(value, where)) is not None:
        return form
    shown = f"{value!r}"[:_SHOWN]
    raise PlainError(
        f"{where.lstrip('.') or 'it'} is {shown} of type {kind.__module__}.{kind.__qualname__}, which JSON does not "
        "hold; make it a text, a number, a list or a dict"
    )


def _encode_dict(value: dict[Any, Any], where: str) -> dict[str, Any]:
    if _KIND not in value and all(type(key) is str for key in value):
        return {key: _encode(entry, f"{where}.{key}") for key, entry in value.items()}
    pairs = [[_encode(key, f"{where} (a key)"), _encode(entry, f"{where}.{key}")] for key, entry in value.items()]
    return {_KIND: ["dict", *pairs]}


def _encode_numpy(value: Any, where: str) -> Any:
    """None where it is of a kind that has no form: records, objects in several dimensions."""
    import numpy as np

    array = type(value) is np.ndarray
    if not (array or isinstance(value, np.generic)):
        return None
    if value.dtype.kind in "biufcSUMm":
        content = base64.b64encode(value.tobytes()).decode()
        return {_KIND: ["array" if array else "scalar", value.dtype.str, list(value.shape), content]}
    if value.dtype == object and value.ndim == 1:
        return {_KIND: ["objects", *(_encode(entry, f"{where}[{number}]") for number, entry in enumerate(value))]}
    return None


def _decode(value: Any) -> Any:
    if type(value) is list:
        return [_decode(entry) for entry in value]
    if type(value) is not dict:
        return value
    if _KIND not in value:
        return {key: _decode(entry) for key, entry in value.items()}
    (name, *rest), others = value[_KIND], len(value) - 1
    if others:
        raise ValueError(f"{_KIND!r} is not alone")
    if name in _FROM_TEXT:
        (text,) = rest
        return _FROM_TEXT[name](text)
    if name in ("array", "scalar"):
        return _decode_numpy(name, *rest)
    entries = [_decode(entry) for entry in rest]
    if name == "dict":
        return dict(entries)
    if name == "objects":
        return _objects(entries)
    if name == "tuple":
        return tuple(entries)
    raise ValueError(f"unknown kind {name!r}")


def _decode_numpy(name: str, dtype: str, shape: list[int], content: str) -> Any:
    import numpy as np

    array = np.frombuffer(base64.b64decode(content, validate=True), dtype=np.dtype(dtype)).reshape(shape)
    return array.copy() if name == "array" else array[()]


def _objects(entries: list[Any]) -> Any:
    import numpy as np

    array = np.empty(len(entries), dtype=object)
    for number, entry in enumerate(entries):  # at once, numpy would take lists of one length for a dimension
        array[number] = entry
    return array
