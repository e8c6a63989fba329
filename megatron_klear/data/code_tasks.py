"""Programming problems made from a seed, with their tests: what a tiny model can learn to write in minutes.

A problem describes a function of one integer by cases, each with a condition and a formula, in words; a program is one
expression. Tests visit every case equally often, so that a program with one case wrong passes a known share of them:
the partial success that a soft reward pays and a hard one does not. Every row serves both stages, as those of
`arithmetic` do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .arithmetic import training_row

NUM_TESTS = 16
MAX_CASES = 4
_LOWEST, _HIGHEST = -30, 60  # of the inputs
_CONSTANTS = range(2, 10)
_PROMPT = "Write a Python function f(x). {cases}"


@dataclass(frozen=True, slots=True)
class _Form:
    """A condition or a formula in x and one constant: its words, its code, its value."""

    words: str
    code: str
    value: Callable[[int, int], int]


_CONDITIONS = (
    _Form("x is even", "x % 2 == 0", lambda x, k: x % 2 == 0),
    _Form("x is a multiple of {k}", "x % {k} == 0", lambda x, k: x % k == 0),
    _Form("x is below {k}", "x < {k}", lambda x, k: x < k),
    _Form("x is above {k}", "x > {k}", lambda x, k: x > k),
)
_FORMULAS = (
    _Form("x plus {k}", "x + {k}", lambda x, k: x + k),
    _Form("x minus {k}", "x - {k}", lambda x, k: x - k),
    _Form("{k} minus x", "{k} - x", lambda x, k: k - x),
    _Form("{k} times x", "{k} * x", lambda x, k: k * x),
)


@dataclass(frozen=True, slots=True)
class _Piece:
    form: _Form
    constant: int

    @property
    def words(self) -> str:
        return self.form.words.format(k=self.constant)

    @property
    def code(self) -> str:
        return self.form.code.format(k=self.constant)

    def __call__(self, x: int) -> int:
        return self.form.value(x, self.constant)


@dataclass(frozen=True, slots=True)
class Task:
    """A function by cases: the formula of the first condition that holds, else the last one."""

    conditions: tuple[_Piece, ...]
    formulas: tuple[_Piece, ...]  # one more than conditions

    def case_of(self, x: int) -> int:
        """The number of the case that `x` falls in."""
        return next((i for i, holds in enumerate(self.conditions) if holds(x)), len(self.conditions))

    def __call__(self, x: int) -> int:
        """The right value."""
        return self.formulas[self.case_of(x)](x)

    @property
    def prompt(self) -> str:
        """The problem in words."""
        *cases, last = (formula.words for formula in self.formulas)
        told = [f"If {c.words}, return {words}." for c, words in zip(self.conditions, cases, strict=True)]
        return _PROMPT.format(cases=" ".join([*told, f"{'Otherwise' if told else 'It must'} return {last}."]))

    @property
    def program(self) -> str:
        """A program that solves it."""
        *cases, last = (formula.code for formula in self.formulas)
        chosen = [f"{code} if {c.code} else " for c, code in zip(self.conditions, cases, strict=True)]
        return f"def f(x):\n    return {''.join(chosen)}{last}\n"


def code_rows(
    count: int,
    *,
    seed: int = 0,
    cases: int = 2,
    slip_share: float = 0.0,
    faulty_share: float = 0.0,
    reference: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield `count` problems of `cases` cases each (1 to 4), with 16 tests or a few more: as many for every case.

    Of the formulas in a row's program, `slip_share` are wrong (another formula or constant), so that there is something
    left to learn from the tests; those have no slips. But `faulty_share` of the problems have tests that expect another
    formula's values in one case, as collected problems do. With `reference` a row has `extra_info.solution`, a right
    program. The ground truth is verl's form of function tests: a JSON text of
    `fn_name`, `inputs` (JSON arguments, one a line) and `outputs`. The same arguments give the same rows on every
    machine. Raises ValueError where an argument makes no sense.
    """
    if count < 0 or not 1 <= cases <= MAX_CASES:
        raise ValueError(f"code rows need count >= 0 and 1 to {MAX_CASES} cases; got {count}, {cases}")
    for name, share in (("slip_share", slip_share), ("faulty_share", faulty_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} of code rows must lie in [0, 1]; got {share}")
    rng, slips, faults = random.Random(seed), random.Random(f"slips of {seed}"), random.Random(f"faults of {seed}")
    for _ in range(count):
        task, inputs = _task(rng, cases)
        written = Task(task.conditions, tuple(_slip(f, slips, slip_share) for f in task.formulas))
        faulty = faults.random() < faulty_share
        tested = _with_fault(task, faults) if faulty else task
        row = _row(task, written, inputs, tested)
        yield row | {"extra_info": {"solution": task.program}} if reference else row


def _task(rng: random.Random, cases: int) -> tuple[Task, list[int]]:
    """A task whose every case holds enough inputs, and as many inputs of each."""
    share = -(-NUM_TESTS // cases)
    while True:
        conditions = tuple(_Piece(form, rng.choice(_CONSTANTS)) for form in rng.sample(_CONDITIONS, cases - 1))
        task = Task(conditions, tuple(_Piece(rng.choice(_FORMULAS), rng.choice(_CONSTANTS)) for _ in range(cases)))
        by_case: list[list[int]] = [[] for _ in range(cases)]
        for x in rng.sample(range(_LOWEST, _HIGHEST + 1), _HIGHEST - _LOWEST + 1):
            by_case[task.case_of(x)].append(x)
        if all(len(inputs) >= share for inputs in by_case):
            return task, [x for inputs in zip(*(inputs[:share] for inputs in by_case), strict=True) for x in inputs]


def _slip(formula: _Piece, slips: random.Random, share: float) -> _Piece:
    if slips.random() >= share:
        return formula
    others = [_Piece(form, constant) for form in _FORMULAS for constant in _CONSTANTS]
    return slips.choice([piece for piece in others if piece != formula])


def _with_fault(task: Task, faults: random.Random) -> Task:
    """The task with one formula changed."""
    place = faults.randrange(len(task.formulas))
    formulas = list(task.formulas)
    formulas[place] = _slip(formulas[place], faults, 1.0)
    return Task(task.conditions, tuple(formulas))


def _row(task: Task, written: Task, inputs: list[int], tested: Task) -> dict[str, Any]:
    tests = {
        "fn_name": "f",
        "inputs": [json.dumps(x) for x in inputs],
        "outputs": [json.dumps(tested(x)) for x in inputs],
    }
    count = len(task.formulas)
    thinking = f"{count} case{'s' * (count > 1)}"
    row = training_row(task.prompt, thinking, f"```python\n{written.program}```", json.dumps(tests), "code_tasks")
    return row | {"ability": "code"}
