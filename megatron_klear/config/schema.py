"""The settings of a config class as a flat table: dotted key, type in plain words, default, documentation.

`read.py` reads values, `--help` prints and error messages explain with this table, so that a setting is described
in one place only: where config.py declares it.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One setting that holds a value (tables are walked through)."""

    name: str
    """Dotted, as on the command line: `optimizer.learning_rate`."""
    annotation: Any
    words: str
    """What is expected, for people: `a whole number of at least 1, or none`."""
    default: Any
    required: bool
    doc: str

    @property
    def default_text(self) -> str:
        """The default as it would be typed, `required` where there is none."""
        if self.required or self.default is PydanticUndefined:
            return "required"
        return "none" if self.default is None else _shown(self.default)


def keys_of(cls: type[BaseModel]) -> dict[str, Key]:
    """Every setting of `cls` by dotted name, in order of declaration; of a choice of tables, those of all choices."""
    return {key.name: key for key in _walk(cls, "", required=True)}


def nearest_key(name: str, known: typing.Collection[str]) -> str | None:
    """The known dotted key most likely meant: the same last word in another table
    or its initials first, then similar spelling.
    """
    last = name.rsplit(".", 1)[-1]
    scored = [(_likeness(name, last, key), key) for key in known]
    score, key = max(scored, default=(0.0, ""), key=lambda pair: pair[0])
    return key if score >= 0.6 else None


def _likeness(name: str, last: str, key: str) -> float:
    """1 for the same last word or its initials (`lr`), more for the same table; below it, likeness of spelling."""
    key_last = key.rsplit(".", 1)[-1]
    whole = difflib.SequenceMatcher(None, name, key).ratio()
    if last == key_last or last == "".join(word[:1] for word in key_last.split("_")):
        return 1.0 + whole
    return 0.6 * difflib.SequenceMatcher(None, last, key_last).ratio() + 0.4 * whole


def tables_in(annotation: Any) -> list[type[BaseModel]]:
    """The config classes an annotation names, through unions, `Annotated` and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for inner in _parts(annotation) for table in tables_in(inner)]


def allows_none(annotation: Any) -> bool:
    """Whether `none` is a value of this annotation."""
    return annotation is type(None) or (is_union(annotation) and any(allows_none(a) for a in get_args(annotation)))


def value_type(annotation: Any) -> Any:
    """The annotation without `Annotated` and without `| None`."""
    if get_origin(annotation) is typing.Annotated:
        return value_type(get_args(annotation)[0])
    if is_union(annotation):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        return value_type(rest[0]) if len(rest) == 1 else annotation
    return annotation


def is_list(annotation: Any) -> bool:
    """Whether values of this annotation are lists."""
    return get_origin(value_type(annotation)) in (list, tuple, set, frozenset)


def in_words(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """What the annotation accepts, in words: `a number above 0`, `one of "auto", "on"`."""
    if get_origin(annotation) is typing.Annotated:
        inner, *more = get_args(annotation)
        return in_words(inner, [*more, *metadata])
    if is_union(annotation):
        members = [in_words(a, metadata) for a in get_args(annotation) if a is not type(None)]
        return ", or ".join(dict.fromkeys(members)) + (", or none" if allows_none(annotation) else "")
    origin = get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(_shown(a) for a in get_args(annotation))
    if origin in (list, tuple, set, frozenset):
        item = get_args(annotation)[0]
        items = "tables" if tables_in(item) else _PLURALS.get(item, "values")
        return f"a list of {items}" + _bounds(metadata, items=True)
    if tables_in(annotation):
        return "a table"
    return _WORDS.get(origin or annotation, "a value") + _bounds(metadata, items=False)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", dict: "a table"}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts", Path: "paths"}


def _bounds(metadata: typing.Sequence[Any], *, items: bool) -> str:
    words = []
    for bound in metadata:
        if isinstance(bound, annotated_types.Gt):
            words.append(f"above {bound.gt}")
        elif isinstance(bound, annotated_types.Ge):
            words.append(f"of at least {bound.ge}")
        elif isinstance(bound, annotated_types.Lt):
            words.append(f"below {bound.lt}")
        elif isinstance(bound, annotated_types.Le):
            words.append(f"of at most {bound.le}")
        elif isinstance(bound, annotated_types.MinLen):
            words.append(f"with at least {bound.min_length} of them" if items else f"of length {bound.min_length} up")
    return (" " + " and ".join(words)) if words else ""


def _walk(cls: type[BaseModel], prefix: str, *, required: bool) -> Iterator[Key]:
    for name, field in cls.model_fields.items():
        dotted = prefix + name
        tables = tables_in(field.annotation)
        if tables and not is_list(field.annotation):
            if len(tables) > 1:
                yield _choice(dotted, field, tables)
            chosen = {dotted + ".kind"} if len(tables) > 1 else set()
            for table in tables:
                inner = _walk(table, dotted + ".", required=required and field.is_required())
                yield from (key for key in inner if key.name not in chosen)
            continue
        default = _default(field)
        yield Key(
            name=dotted,
            annotation=field.annotation,
            words=in_words(field.annotation, field.metadata),
            default=default,
            required=required and default is PydanticUndefined,
            doc=" ".join((field.description or "").split()),
        )


def _choice(dotted: str, field: FieldInfo, tables: list[type[BaseModel]]) -> Key:
    """The `kind` that chooses one of several tables."""
    kinds = tuple(table.model_fields["kind"].default for table in tables)
    annotation = Literal[kinds]  # type: ignore[valid-type]
    return Key(
        name=dotted + ".kind",
        annotation=annotation,
        words=in_words(annotation),
        default=getattr(field.default, "kind", PydanticUndefined),
        required=False,
        doc="",
    )


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=not field.default_factory_takes_validated_data)  # type: ignore[call-overload]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    return str(value)


def is_union(annotation: Any) -> bool:
    """Whether the annotation is a choice of several."""
    return get_origin(annotation) in (typing.Union, types.UnionType)


def _parts(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is typing.Annotated:
        return (get_args(annotation)[0],)
    if get_origin(annotation) is Literal:
        return ()
    return tuple(a for a in get_args(annotation) if a is not Ellipsis)
