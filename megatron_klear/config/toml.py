"""A small TOML writer for settings: what `tomllib` reads back to the same values; and where keys stand in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")
_TABLE_LINE = re.compile(r"\s*\[\s*([A-Za-z0-9_.\s-]+?)\s*\]")
_KEY_LINE = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*=")


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML text of nested mappings of text, paths, numbers, booleans and lists; `None` becomes the text `"none"`."""
    return "\n".join(_lines(table, ())).strip() + "\n"


def line_numbers(text: str) -> dict[str, int]:
    """Line of each `key =` by dotted name, as far as plain TOML goes; only used to point at mistakes."""
    lines: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if table := _TABLE_LINE.match(line):
            prefix = table[1].replace(" ", "") + "."
            lines.setdefault(prefix[:-1], number)
        elif key := _KEY_LINE.match(line):
            lines.setdefault(prefix + key[1], number)
    return lines


def _lines(table: Mapping[str, Any], parents: tuple[str, ...]) -> list[str]:
    values = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    tables = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    lines = [f"{_key(k)} = {_value(v)}" for k, v in values.items()]
    for name, inner in tables.items():
        path = (*parents, name)
        lines += ["", f"[{'.'.join(_key(p) for p in path)}]", *_lines(inner, path)]
    return lines


def _key(name: str) -> str:
    return name if _BARE_KEY.match(name) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _text(str(value))
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    raise TypeError(f"no TOML form for {type(value).__name__}")
