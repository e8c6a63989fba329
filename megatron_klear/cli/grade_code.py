"""`klear grade code`: programs against the tests of their rows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from megatron_klear.errors import UserError
from megatron_klear.rewards.base import RewardSettings
from megatron_klear.rewards.code.forms import FormError, check_form
from megatron_klear.rewards.code.settings import CodeSettings, Comparison, Kind, SandboxKind
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score

_DEFAULTS = CodeSettings()
_MOST = 1e6  # of seconds, or GiB
_SHORTEST_FENCE = 3


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the subcommand besides those that all kinds have."""
    command.add_argument("--input", type=Path, required=True, help="JSONL with response or program, and tests")
    command.add_argument("--kind", choices=get_args(Kind), default=_DEFAULTS.kind, help="what passed tests are worth")
    command.add_argument(
        "--comparison", choices=get_args(Comparison), default=_DEFAULTS.comparison, help="when an answer is right"
    )
    command.add_argument("--sandbox", choices=get_args(SandboxKind), default=_DEFAULTS.sandbox)
    command.add_argument("--url", default="", help="of a remote sandbox: http://host:port")
    command.add_argument("--cpu-seconds", type=float, default=_DEFAULTS.cpu_seconds, help="of one test")
    command.add_argument("--total-seconds", type=float, default=_DEFAULTS.total_seconds, help="of all tests of a row")
    command.add_argument("--memory-gib", type=float, default=_DEFAULTS.memory_gib, help="address space of a program")
    command.add_argument("--max-tests", type=int, default=_DEFAULTS.max_tests, help="of a row; 0 is all (default)")
    command.add_argument(
        "--package",
        action="append",
        metavar="NAME",
        help=f"a pure Python package that programs may import (repeatable; default {', '.join(_DEFAULTS.packages)})",
    )


def check_arguments(options: argparse.Namespace, command: argparse.ArgumentParser) -> None:
    """End with a message where a number is out of its range."""
    for name in ("cpu_seconds", "total_seconds", "memory_gib"):
        if not 0 < getattr(options, name) < _MOST:  # nan too
            command.error(f"--{name.replace('_', '-')} must be above 0 and below {_MOST:g}")
    if (options.sandbox == "remote") != bool(options.url):
        command.error("--url goes with --sandbox remote")
    if options.max_tests < 0:
        command.error("--max-tests must not be below 0")


def settings_of(options: argparse.Namespace) -> RewardSettings:
    """What the command line asks for. A response that is a program as a whole needs no fence here."""
    code = CodeSettings(
        kind=options.kind,
        comparison=options.comparison,
        sandbox=options.sandbox,
        url=options.url,
        cpu_seconds=options.cpu_seconds,
        total_seconds=options.total_seconds,
        memory_gib=options.memory_gib,
        max_tests=options.max_tests,
        packages=_DEFAULTS.packages if options.package is None else tuple(options.package),
        whole_programs=True,
    )
    return RewardSettings(require_thinking=False, code=code)


def check_row(row: Any, where: str) -> None:
    """Raise UserError where a row has not one of response and program, or tests that cannot be read."""
    given = (
        [row[name] for name in ("response", "program") if row.get(name) is not None] if isinstance(row, dict) else []
    )
    if len(given) == 2:
        raise UserError(f"{where}: both `response` and `program` are there; leave out the one that is not to be graded")
    if not given or not isinstance(given[0], str):
        raise UserError(f"{where}: expected an object with `response` or `program` (a text) and `tests`")
    if row.get("tests") is None:
        raise UserError(f"{where}: `tests` is missing")
    try:
        check_form(row["tests"])
    except FormError as error:
        raise UserError(f"{where}: {error}") from None


def request_of(row: Mapping[str, Any]) -> Request:
    """What is asked of the pool; a program is fenced, so that it reads like a response."""
    if isinstance(row.get("program"), str):
        program, fence = row["program"], "`" * _SHORTEST_FENCE
        while fence in program:
            fence += "`"
        return Request("code", row["tests"], f"{fence}python\n{program}\n{fence}\n")
    return Request("code", row["tests"], row["response"])


def graded(score: Score) -> dict[str, Any]:
    """What is added to a row; one whose grading itself failed has passed nothing."""
    found = score.program
    return {
        "reward": score.reward,
        "passed": found.passed if found else 0,
        "total": found.total if found else 0,
        "verdict": found.status if found else score.verdict.value,
        "verdict_note": score.note,
    }
