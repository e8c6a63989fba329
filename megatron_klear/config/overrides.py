"""Dotted flags of the command line as the values that the same setting would have in the file.

    --train.epochs 2   --data.train a.jsonl b.jsonl   --sampling.stop_token_ids 509   --model.fused_loss=false
    --prompts.sources '[{files = ["x.jsonl"]}]'       --reward.functions.openai/gsm8k math

A flag takes what TOML takes after the `=`; text needs no quotes there, and a list of plain values no brackets.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from megatron_klear.config.schema import Key, allows_none, is_list, is_union, keys_of, tables_in, value_type

_FLAG = re.compile(r"""--(?P<name>(?:"[^"]*"|'[^']*'|[^="'])+)(?P<equals>=?)(?P<value>.*)""", re.DOTALL)
_NOTHING = object()


def split_flags(argv: Sequence[str], problems: list[str]) -> dict[str, list[str]]:
    """`--name a b`, `--name=a` and bare `--name` as name -> words; the last of several equal flags wins."""
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in argv:
        if flag := _FLAG.fullmatch(argument):
            name = flag["name"]
            flags.pop(name, None)  # a later flag also comes later where one names a table and one a key of it
            current = flags[name] = [flag["value"]] if flag["equals"] else []
            if flag["equals"]:
                current = None
        elif current is None:
            problems.append(
                f"{argument!r} on the command line belongs to no flag; settings are given as --table.key value"
            )
        else:
            current.append(argument)
    return flags


def override(
    cls: type[BaseModel], values: dict[str, Any], flags: dict[str, list[str]], problems: list[str]
) -> tuple[set[str], list[str]]:
    """Put the flags' values into `values`, the tables of the file; the dotted names set, and those of no setting.

    A table that a flag gives as a whole (`--loss '{kind = "ppo"}'`) replaces the file's; what cannot be read is told
    in `problems`.
    """
    known = keys_of(cls)
    tables = {name.rpartition(".")[0] for name in known if "." in name}
    flagged: set[str] = set()
    unknown: list[str] = []
    for flag, words in flags.items():
        path, annotation = _place(flag, known, tables, words)
        if not path:
            unknown.append(flag)
            continue
        value = _from_words(f"--{flag}", annotation, words, problems)
        if value is not _NOTHING:
            _put(values, path, value, problems)
            flagged.add(".".join(path))
    return flagged, unknown


def _place(flag: str, known: dict[str, Key], tables: set[str], words: Sequence[str]) -> tuple[tuple[str, ...], Any]:
    """Tables and key that a flag names, and the annotation of its value; no key where there is no such setting.

    Dashes may stand for underscores, but not in the names that a free table (`[reward.functions]`) is given.
    """
    name = flag.replace("-", "_")
    if name in known:
        return tuple(name.split(".")), known[name].annotation
    if name in tables and len(words) == 1 and words[0].startswith("{"):
        return tuple(name.split(".")), dict
    for key in known.values():
        kind = value_type(key.annotation)
        prefix = flag[: len(key.name) + 1]
        if get_origin(kind) is dict and prefix.replace("-", "_") == key.name + "." and len(flag) > len(prefix):
            return (*key.name.split("."), _unquoted(flag[len(prefix) :])), get_args(kind)[1]
    return (), None


def _unquoted(text: str) -> str:
    """The text of a TOML string, other text as it is."""
    if text[:1] not in ("'", '"') or len(text) < 2 or text[0] != text[-1]:
        return text
    value = _toml(text)
    return value if isinstance(value, str) else text


def _toml(text: str) -> Any:
    """What stands after `key =`; `_NOTHING` where that is no TOML."""
    try:
        values = tomllib.loads(f"value = {text}\n")
    except tomllib.TOMLDecodeError:
        return _NOTHING
    return values["value"] if len(values) == 1 else _NOTHING


def _from_words(flag: str, annotation: Any, words: list[str], problems: list[str]) -> Any:
    """A flag's words as the value TOML would have given; what does not convert is left for validation to report."""
    kind = value_type(annotation)
    if words == ["none"] and allows_none(annotation):
        return None
    listed, table = is_list(kind), _is_table(kind)
    if len(words) == 1 and ((listed and _bracketed(words[0], "[]")) or (table and words[0].startswith("{"))):
        return _structure(flag, words[0], problems)
    if listed:
        item = get_args(kind)[0]
        if tables_in(item) and all(_bracketed(word, "{}") for word in words):
            read = [_structure(flag, word, problems) for word in words]
            return _NOTHING if _NOTHING in read else read
        return [_scalar(item, word) for word in words]
    if kind is bool and not words:
        return True
    return _scalar(kind, words[0]) if len(words) == 1 else words


def _is_table(kind: Any) -> bool:
    return kind is dict or get_origin(kind) is dict or bool(tables_in(kind) and not is_list(kind))


def _bracketed(word: str, brackets: str) -> bool:
    # A glob may begin with a bracket, [ab].jsonl: a list also ends with one.
    return word.strip().startswith(brackets[0]) and word.strip().endswith(brackets[1])


def _structure(flag: str, word: str, problems: list[str]) -> Any:
    """A list or table in TOML, or in JSON."""
    value = _toml(word)
    if value is not _NOTHING:
        return value
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        problems.append(
            f"{flag}: {word} is neither TOML nor JSON; inside of brackets text needs quotes, tables are written "
            "{key = value}, and the shell leaves all of it alone in single quotes"
        )
        return _NOTHING


def _scalar(kind: Any, word: str) -> Any:
    kind = value_type(kind)
    if kind is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            return word
    if kind is Any or is_union(kind) or get_origin(kind) is Literal:
        return _of_choice(kind, word)
    return _unquoted(word)


def _of_choice(kind: Any, word: str) -> Any:
    """A word where numbers and texts may stand: what TOML reads where it is allowed, else text."""
    if kind is not Any and word in get_args(kind):
        return word
    value = _toml(word)
    if value is _NOTHING:
        return word
    text_allowed = kind is Any or str in get_args(kind) or isinstance(value, str)
    return value if text_allowed or isinstance(value, int | float) else word


def _put(values: dict[str, Any], path: Sequence[str], value: Any, problems: list[str]) -> None:
    *tables, last = path
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            problems.append(f"--{'.'.join(path)}: {table} is {inner!r} in the file, expected a table [{table}]")
            return
        values = inner
    values[last] = value
