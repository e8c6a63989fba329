"""Rotary position embedding as config.json asks for it, read as transformers reads it, or refused.

transformers 4 wrote `rope_theta` and `rope_scaling`, transformers 5 writes one `rope_parameters` with the base inside,
and both are edited by hand. Of two spellings transformers takes `rope_scaling`, with the base of that table alone; of
`original_max_position_embeddings` the one at the top level. Where a config says two different things, programs disagree
about which model it is, so that is an error here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from megatron_klear.errors import UserError

RopeKind = Literal["default", "linear", "llama3", "yarn"]

DEFAULT_THETA = 10000.0
_REQUIRED: dict[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ORIGINAL = "original_max_position_embeddings"


class ArchitectureError(UserError, ValueError):
    """A config.json that is missing, malformed, or asks for something this project does not compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding: base and, where the config scales it, the kind and its parameters."""

    theta: float
    kind: RopeKind = "default"
    parameters: tuple[tuple[str, float | int | bool], ...] = ()
    """What the kind reads of `rope_scaling` or `rope_parameters`, for transformers' own frequency functions."""


def read_rope(config: Mapping[str, Any], source: str) -> Rope:
    """The rotary embedding of a parsed config.json; `source` names it in errors.

    Raises ArchitectureError where it is malformed, of a kind that is not computed, or says two different things.
    """
    tables = {name: _table(config, name, source) for name in ("rope_scaling", "rope_parameters")}
    readings = {name: _reading(table, config, f"{source}: {name}", source) for name, table in tables.items() if table}
    if not readings:
        return _reading({}, config, source, source)
    scaling = readings.get("rope_scaling", readings.get("rope_parameters"))
    if len(set(readings.values())) > 1:
        told = "; ".join(f"{name} means {_told(reading)}" for name, reading in readings.items())
        raise ArchitectureError(
            f"{source}: rope_scaling and rope_parameters contradict each other: {told}. Keep one of them, with "
            "rope_theta and the scaling both in it"
        )
    assert scaling is not None
    return scaling


def _table(config: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    table = config.get(name)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise ArchitectureError(f"{source}: {name} is {table!r}, expected a table or null")
    nested = [key for key, value in table.items() if isinstance(value, dict)]
    if nested:
        raise ArchitectureError(f"{source}: {name} differs by kind of layer ({', '.join(nested)}), not supported")
    return dict(table)


def _reading(table: Mapping[str, Any], config: Mapping[str, Any], where: str, source: str) -> Rope:
    """What one table means together with the keys beside it at the top level."""
    kind = _same(table, "rope_type", table, "type", where) or "default"
    if kind not in _REQUIRED:
        raise ArchitectureError(f"{where}: rope_type {kind!r} is not supported; supported: {', '.join(_REQUIRED)}")
    kind = cast(RopeKind, kind)
    partial = _same(table, "partial_rotary_factor", config, "partial_rotary_factor", where)
    if partial not in (None, 1):
        raise ArchitectureError(f"{where}: partial_rotary_factor {partial} is not supported")
    theta = _same(table, "rope_theta", config, "rope_theta", where)
    values: dict[str, float | int | bool] = {}
    positions = config.get("max_position_embeddings")
    if kind in ("llama3", "yarn"):
        original = _same(table, _ORIGINAL, config, _ORIGINAL, where)
        values[_ORIGINAL] = _positive(positions if original is None else original, _ORIGINAL, where)
    for name in _REQUIRED[kind]:
        value = table.get(name)
        if kind == "yarn" and name == "factor" and name in table and value is None:
            value = _positive(positions, "max_position_embeddings", source) / values[_ORIGINAL]
        values[name] = _positive(value, name, where)
    if kind == "yarn":
        values |= {name: _number(table[name], name, where) for name in _OPTIONAL if table.get(name) is not None}
        if "truncate" in table:
            values["truncate"] = bool(table["truncate"])
    return Rope(
        theta=DEFAULT_THETA if theta is None else float(_positive(theta, "rope_theta", where)),
        kind=kind,
        parameters=tuple(sorted(values.items())),
    )


def _same(inside: Mapping[str, Any], key: str, beside: Mapping[str, Any], other: str, where: str) -> Any:
    """The value of two keys for the same thing, None where neither has one."""
    found = [table[name] for table, name in ((inside, key), (beside, other)) if table.get(name) is not None]
    if len(found) > 1 and found[0] != found[1]:
        place = "beside it" if inside is beside else "at the top level"
        raise ArchitectureError(
            f"{where}: {key} {found[0]!r} contradicts {other} {found[1]!r} {place}; keep the one that the model was "
            "trained with"
        )
    return found[0] if found else None


def _number(value: Any, name: str, where: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArchitectureError(f"{where}: {name} is {value!r}, expected a number")
    return value


def _positive(value: Any, name: str, where: str) -> float | int:
    if not _number(value, name, where) > 0:
        raise ArchitectureError(f"{where}: {name} is {value!r}, expected a number above 0")
    return cast("float | int", value)


def _told(rope: Rope) -> str:
    values = ", ".join(f"{name} {value}" for name, value in rope.parameters)
    return f"{rope.kind} with rope_theta {rope.theta:g}{', ' + values if values else ''}"
