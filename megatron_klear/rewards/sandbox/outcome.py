"""What is run, under which limits, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Status = Literal["done", "timeout", "memory", "crashed", "contained", "output", "compile", "skipped", "unusable"]
"""How a program ended on one test.

`done` by itself with exit code 0, which says nothing of its answer; `timeout` by a limit on time; `memory` for want of
it; `crashed` by an exception, a signal or another exit code; `contained` by a system call that it may not make, or with
its sandbox; `output` by writing more than it may; `compile` before it began; `skipped`: it was not run on this test;
`unusable`: a trusted test, which does what cannot be done from another process.
"""
Mode = Literal["stdin", "call", "expression"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may use. A test is one input of it."""

    cpu_seconds: float = 2.0
    """Computing time of a test, of all its threads together: the time limit."""
    wall_seconds: float = 8.0
    """Time of a test by the clock, for programs that sleep."""
    total_seconds: float = 60.0
    """Time of all tests of a program by the clock."""
    memory_bytes: int = 1 << 30
    """Address space."""
    output_bytes: int = 16 << 20
    """Longest standard output, standard error, returned value and file, each."""
    threads: int = 32
    recursion: int = 50_000
    """Python's recursion limit at the start; programs may raise it."""
    source_bytes: int = 1 << 20
    """Longer programs are not run."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program that a model wrote.

    Its inputs, by `mode`:
    `stdin`: the bytes of standard input; the answer is what it prints. Its name is `__main__`.
    `call`: `values.encode_arguments([...])` for the function `entry`, which is a method of the program's class
        `Solution` where it has one of that name (a new instance a call), else a function; the answer is the `result`.
    `expression`: JSON `{"setup": "statements", "expression": "...", "asks": ["name"]?}`, executed and evaluated where
        the program was, which must have defined the names that are asked for; the answer is the `result`.
    """

    source: str
    mode: Mode = "stdin"
    prelude: str = ""
    """Trusted source executed in front, once a sandbox. The names that it leaves are built in for the program."""
    entry: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a program did on one test. The bytes are the program's own: data, whatever they say."""

    status: Status
    stdout: bytes = b""
    stderr: bytes = b""
    """Its last 64 KiB."""
    result: bytes = b""
    """A value as `values.decode` reads it."""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_bytes: int = 0
    """Largest resident memory of the process; 0 where its process went on to the next test."""
    note: str = ""
    """Why it did not end well, in words: an exception's last line, or "exit 3" where the program left by itself."""


Verdict = Callable[[int, Outcome], bool]


class Sandbox(Protocol):
    """Runs programs that can do no harm. It belongs to the thread that opened it."""

    def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        *,
        limits: Limits = DEFAULT_LIMITS,
        passed: Verdict | None = None,
        enough: Verdict | None = None,
    ) -> list[Outcome]:
        """Outcomes of a program on its inputs, as many and in their order.

        `passed` says of the outcome of a test whether its answer is right. With it all tests share a process, which is
        many times faster; what did not pass there runs again in a process of its own, and that outcome counts.
        `enough` is asked after each test's outcome that counts: True, and the tests after it are skipped.
        Raises RewardError where the sandbox cannot be started or the prelude fails.
        """
        ...

    def run_check(self, program: Program, check: str, *, limits: Limits = DEFAULT_LIMITS) -> Outcome:
        """What a trusted test says of a program; `done` where it ended without an exception.

        The test is source that calls what the program defines, by the names there, and `candidate`, the program's
        `entry`. It runs in a process of its own: arguments and values cross as data, a list or dict that the program
        changes is changed in the test as well, and no object of the program is ever in the test's process.
        Otherwise the status is the program's where it did not end well, else `crashed` with the exception in `note`.
        """
        ...

    def close(self) -> None:
        """End the sandbox and every process in it."""
        ...
