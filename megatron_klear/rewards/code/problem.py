"""What the tests of a problem are, once its ground truth is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

Mode = Literal["stdin", "call", "expression"]


@dataclass(frozen=True, slots=True)
class Text:
    """Standard output should be this."""

    text: bytes


@dataclass(frozen=True, slots=True)
class AnyOf:
    """A returned value should equal one of these, as the comparison has it."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Is:
    """A value should be this very constant: None, True or False."""

    value: bool | None


@dataclass(frozen=True, slots=True)
class Near:
    """A number should be no further away than the test says."""

    value: float
    relative: float = 0.0
    absolute: float = 0.0
    inclusive: bool = True


Expected = Text | AnyOf | Is | Near


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the program: what goes in, and what should come out, which never goes in.

    `input` is what the sandbox takes in the problem's mode.
    """

    input: bytes
    expected: Expected


@dataclass(frozen=True, slots=True)
class Check:
    """A test that cannot be split: trusted source that runs in a process of its own and asks the program's."""

    source: str


Test = Case | Check


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The tests of one problem, in their order, and how a program is run for them."""

    mode: Mode
    tests: tuple[Test, ...]
    entry: str = ""
    """The function that the tests call, or the method of `Solution`; empty where each test names its own."""
    prelude: str = ""
    """Runs in front of the program."""
    complete: Callable[[str], str] | None = None
    """Makes a whole program of what a response holds, where that may be the rest of the prompt's function."""
    whole: bool = False
    """The published code gives all or nothing here."""

    def of(self, tests: tuple[Test, ...]) -> Problem:
        """The problem with some of its tests."""
        return replace(self, tests=tests)


def expression_input(setup: str, expression: str, asks: Iterable[str] = ()) -> bytes:
    """The input of a case in mode `expression`; `asks` names what the program itself must define for it."""
    needed = {"asks": sorted(asks)} if asks else {}
    return json.dumps({"setup": setup, "expression": expression, **needed}).encode()
