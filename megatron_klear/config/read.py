"""Read a run's settings: one TOML file, then dotted overrides from the command line.

    pretrain_sft.py --config run.toml --optimizer.learning_rate 2e-6 --data.train a.jsonl b.jsonl --dry-run

Everything wrong is reported in one go, in words, with the file's line or the flag, and ends with exit code 2.
Relative paths are taken from the current directory, in the file as on the command line.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megatron_klear.config.files import write_text_atomically
from megatron_klear.config.overrides import override, split_flags
from megatron_klear.config.schema import (
    Key,
    allows_none,
    in_words,
    is_list,
    keys_of,
    nearest_key,
    tables_in,
    value_type,
)
from megatron_klear.config.toml import line_numbers, to_toml
from megatron_klear.errors import UserError
from megatron_klear.models.architecture import ArchitectureError

C = TypeVar("C", bound=BaseModel)

SPEAKER_SECONDS = 30.0
"""How long the first process of a machine may take to meet the problem that another one met."""


class SettingsError(UserError, ValueError):
    """Settings that cannot be used; `problems` has one sentence for each thing that is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine(Generic[C]):
    """What an entry script was asked to do."""

    config: C
    dry_run: bool
    """Print the plan of the run and stop."""
    planned_processes: int | None = None
    """N of `--dry-run=N`: plan for N processes instead of those started."""


def parse_command_line(cls: type[C], argv: Sequence[str] | None = None, *, description: str = "") -> CommandLine[C]:
    """Settings from the command line of a script (`sys.argv` unless given).

    Prints help and exits with 0 on `--help`; prints every problem to stderr and exits with 2 where there is one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(cls, description))
        raise SystemExit(0)
    with exit_on_bad_input():
        dry_runs = [argument for argument in arguments if argument.partition("=")[0] == "--dry-run"]
        planned = [argument.partition("=")[2] for argument in dry_runs if "=" in argument]
        if not all(number.isdigit() and int(number) > 0 for number in planned):
            raise SettingsError([f"{dry_runs[-1]}: expected a number of processes, as in --dry-run=64"])
        config = load(cls, [argument for argument in arguments if argument not in dry_runs])
    processes = int(planned[-1]) if planned else None
    return CommandLine(config=config, dry_run=bool(dry_runs), planned_processes=processes)


def load(cls: type[C], argv: Sequence[str]) -> C:
    """Settings of `cls` from `--config FILE` and dotted overrides; the last of several equal flags wins.

    Raises SettingsError that lists everything wrong with the file and the flags.
    """
    problems: list[str] = []
    flags = split_flags(argv, problems)
    config_path = flags.pop("config", None)
    if config_path is None:
        problems.append("--config FILE.toml is required: the file with the settings of the run")
    elif len(config_path) != 1:
        problems.append(f"--config takes one file, {len(config_path)} given")
    path = Path(config_path[0]) if config_path else None
    values, lines = _read_toml(path, problems) if path and not problems else ({}, {})
    if problems:
        raise SettingsError(problems)
    flagged, unknown = override(cls, values, flags, problems)
    known = keys_of(cls)
    problems += [_unknown(f"--{flag}", flag.replace("-", "_"), known) for flag in unknown]
    return _validate(cls, values, _Sources(file=str(path), lines=lines, flagged=frozenset(flagged)), problems)


def from_flags(cls: type[C], flags: Mapping[str, list[str]], where: str) -> C:
    """Settings of `cls` from flags alone, each name with its words; `where` is the command, to name in messages.

    Raises SettingsError that lists everything wrong.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    flagged, unknown = override(cls, values, dict(flags), problems)
    problems += [_unknown(f"--{flag}", flag, keys_of(cls)) for flag in unknown]
    return _validate(cls, values, _Sources(file=where, lines={}, flagged=frozenset(flagged)), problems)


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """End the process with exit code 2 and the list of problems when the block meets bad settings or a bad model."""
    try:
        yield
    except SettingsError as error:
        exit_with(error.problems)
    except ArchitectureError as error:
        exit_with([str(error)])


def exit_with(problems: Sequence[str]) -> NoReturn:
    """Print problems to stderr, once a machine, and exit with code 2.

    torchrun ends all processes when one ends: the others of a machine give its first the time to print. One that is
    still there after `SPEAKER_SECONDS` was refused alone, and prints for itself.
    """
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    if not speaks:
        speaks = _is_left_alone()
    if speaks:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        print(f"error: {count}, nothing was started:", file=sys.stderr)
        for problem in problems:
            print(f"  - {problem}", file=sys.stderr)
        sys.stderr.flush()
    raise SystemExit(2)


def _is_left_alone() -> bool:
    """True after `SPEAKER_SECONDS` in which nobody ended this process and its parent lived."""
    parent, until = os.getppid(), time.monotonic() + SPEAKER_SECONDS
    while time.monotonic() < until:
        if os.getppid() != parent:
            return False
        time.sleep(0.05)
    return True


def help_text(cls: type[BaseModel], description: str = "") -> str:
    """Every setting with its type, default and documentation, as `--help` shows it."""
    out = [description.strip()] if description else []
    out += [
        "usage: --config FILE.toml [--dry-run[=PROCESSES]] [--key value ...]",
        "Settings, in the file as [table] key = value, on the command line as --table.key value; values are TOML's.",
        "Relative paths are taken from the current directory; none unsets what can be unset.",
    ]
    table = None
    for key in keys_of(cls).values():
        head = key.name.rpartition(".")[0]
        if head != table:
            table = head
            out += ["", f"[{head}]" if head else "(top level)"]
        out.append(
            f"  --{key.name}   {key.words}   (default {key.default_text})".replace("(default required)", "(required)")
        )
        out += textwrap.wrap(key.doc, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(out)


RESUME_BREAKING = (
    "seed",
    "model.path",
    "model.checkpoint",
    "model.weights",
    "model.dtype",
    "lora.*",
    "data.*",
    "train.rows_per_step",
    "train.aggregation",
)
"""Settings that a resumed run must share with the one it goes on from: they decide the model, its optimizer state's
form, or which samples a step sees. Others (layout, learning rate, length, logging) may change and are only told."""

RESUME_HARMLESS = ("data.cache", "data.workers", "data.validation")
"""Exceptions to RESUME_BREAKING: they change nothing of what is trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A setting that is not what it was in an earlier run of the same output folder."""

    key: str
    old: Any
    new: Any

    @property
    def breaks_resume(self) -> bool:
        """Whether going on from the earlier run's checkpoint would not continue that run."""
        matches = any(fnmatchcase(self.key, pattern) for pattern in RESUME_BREAKING)
        return matches and self.key not in RESUME_HARMLESS

    def __str__(self) -> str:
        """`optimizer.learning_rate: 8e-05 -> 1e-05`."""
        old, new = ("not set" if value is _ABSENT else json.dumps(value) for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def write_resolved(config: BaseModel, path: Path) -> None:
    """Write every setting, defaults included, as TOML that loads back to an equal config; whole or not at all."""
    text = to_toml(config.model_dump(mode="json"))
    write_text_atomically(path, "# All settings of this run: file, flags and defaults.\n" + text)


def differences(old: Path, new: BaseModel) -> list[Difference]:
    """Settings of `new` that are not as in the resolved TOML `old`, in order of declaration.

    Raises SettingsError when `old` cannot be read.
    """
    problems: list[str] = []
    before = _flat(_read_toml(old, problems)[0])
    if problems:
        raise SettingsError(problems)
    after = _flat(tomllib.loads(to_toml(new.model_dump(mode="json"))))
    names = [*after, *(name for name in before if name not in after)]
    pairs = ((name, before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names)
    return [Difference(key=name, old=a, new=b) for name, a, b in pairs if a != b]


_ABSENT = object()


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where each value came from, to name it in messages."""

    file: str
    lines: dict[str, int]
    flagged: frozenset[str]

    def of(self, name: str) -> str:
        for flag in self.flagged:
            if f"{name}.".startswith(f"{flag}."):
                return f"--{flag}"
        line = self.lines.get(name)
        return f"{self.file}:{line}" if line else self.file


def _read_toml(path: Path, problems: list[str]) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), line_numbers(text)
    except FileNotFoundError:
        problems.append(f"{path}: there is no such file (the current directory is {Path.cwd()})")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read as text: {error}")
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{path}: not valid TOML: {error} (text needs quotes, tables are written [name])")
    return {}, {}


def _validate(cls: type[C], values: dict[str, Any], sources: _Sources, problems: list[str]) -> C:
    try:
        # Strict: "8" is no number and 1 is no boolean.
        config = cls.model_validate(_typed(cls, values), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        places = [detail["loc"] for detail in details if detail["type"] != "too_short"]
        # A list whose only item is wrong is not short of one.
        told = [
            d for d in details if d["type"] != "too_short" or not any(p[: len(d["loc"])] == d["loc"] for p in places)
        ]
        found = [_explain(cls, detail, sources) for detail in told]
        raise SettingsError(list(dict.fromkeys([*problems, *found]))) from None
    if problems:
        raise SettingsError(problems)
    return config


def _typed(annotation: Any, value: Any) -> Any:
    """TOML's value in Python's types: paths, tuples, and `"none"` as None where it is allowed."""
    if value == "none" and allows_none(annotation):
        return None
    kind = value_type(annotation)
    if isinstance(value, dict) and get_origin(kind) is dict:
        return {k: _typed(get_args(kind)[1], v) for k, v in value.items()}
    if isinstance(value, dict):
        fields = {k: f.annotation for table in tables_in(annotation) for k, f in table.model_fields.items()}
        return {k: _typed(fields.get(k, Any), v) for k, v in value.items()}
    if isinstance(value, list) and is_list(kind):
        return get_origin(kind)(_typed(get_args(kind)[0], v) for v in value)
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    return value


def _explain(cls: type[BaseModel], detail: Any, sources: _Sources) -> str:
    """One problem found by validation, as a sentence with its source, the value and the remedy."""
    known = keys_of(cls)
    name, annotation = _locate(cls, detail["loc"])
    where = sources.of(name)
    kind = detail["type"]
    if kind == "missing":
        return _missing(name, known, sources)
    if kind == "extra_forbidden":
        table = name.rpartition(".")[0]
        if name in known or any(key.startswith(name + ".") for key in known):
            return (
                f"{where}: {name} is no setting of the kind that {table}.kind chooses; choose another or leave it out"
            )
        return _unknown(where, name, known)
    if kind == "value_error":
        return f"{where}: {detail['ctx']['error']}"
    given = detail["input"]
    key = known.get(name)
    expected = key.words if key else in_words(annotation)
    if kind == "union_tag_invalid":
        given, expected = repr(detail["ctx"]["tag"]), f"one of {detail['ctx']['expected_tags']}"
        return f"{where}: {name}.kind is {given}, expected {expected}"
    if kind == "union_tag_not_found":
        return f"{where}: {name} does not say which kind it is; add kind = ... to [{name}]"
    if tables_in(annotation) and not is_list(annotation):
        expected = f"a table [{name}]"
    shown = "an empty list" if given == () else json.dumps(given, ensure_ascii=False, default=str)
    return f"{where}: {name} is {shown}, expected {expected}"


def _missing(name: str, known: dict[str, Key], sources: _Sources) -> str:
    needed = [key for key in known.values() if key.required and (key.name == name or key.name.startswith(name + "."))]
    names = ", ".join(f"{key.name} ({key.words})" for key in needed) or name
    flag = needed[0].name if needed else name
    return f"{sources.file}: {names} is required and missing; set it in the file or with --{flag}"


def _unknown(where: str, name: str, known: dict[str, Key]) -> str:
    tables = {key.rpartition(".")[0] for key in known if "." in key}
    if name in tables:
        inside = nearest_key(name, known) or next(key for key in known if key.startswith(name + "."))
        return f"{where}: {name} is a table of settings; set one of them, such as --{inside}"
    lists = {key.name: key for key in known.values() if is_list(key.annotation) and tables_in(key.annotation)}
    fields = [f"{key}.{field}" for key in lists for t in tables_in(lists[key].annotation) for field in t.model_fields]
    if name in fields:
        table, _, field = name.rpartition(".")
        return f"{where}: {table} is a list of tables, given as a whole: --{table} '[{{{field} = ...}}]'"
    candidates = [*known, *fields]
    near = nearest_key(name, [*candidates, *tables] if "." not in name else candidates)
    if near is None:  # an entry of a free table whose name is not quite right
        table, _, entry = name.rpartition(".")
        free = [key.name for key in known.values() if get_origin(value_type(key.annotation)) is dict]
        found = nearest_key(table, free)
        near = f"{found}.{entry}" if found else None
    hint = f"; did you mean {near}?" if near else "; --help lists the settings"
    return f"{where}: there is no setting {name}{hint}"


def _locate(cls: type[BaseModel], loc: Sequence[str | int]) -> tuple[str, Any]:
    """Dotted name and annotation of an error's place; the tags that a choice of tables adds to it are left out."""
    annotation: Any = cls
    names: list[str] = []
    for part in loc:
        fields = {k: f for table in tables_in(annotation) for k, f in table.model_fields.items()}
        if part in fields:
            annotation = fields[str(part)].annotation
            names.append(str(part))
        elif isinstance(part, str) and len(tables_in(annotation)) <= 1:
            names.append(part)
            annotation = Any
        elif isinstance(part, str) and part == loc[-1]:
            names.append(part)
    return ".".join(names), annotation
