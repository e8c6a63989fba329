"""The trusted side: a slot runs one program after the other in a sandbox that outlives them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_klear.rewards.base import RewardError

from .channels import Channels
from .endings import last_line, outcome_of, unanswered
from .inside import runner
from .outcome import DEFAULT_LIMITS, Limits, Outcome, Program, Verdict
from .remedies import remedy
from .zygote import LostError, Zygote

_GRACE_SECONDS = 10.0
"""For answers of the sandbox's trusted part beyond the program's own time, on a busy machine."""
_DESCRIPTORS = 5


@dataclass(slots=True)
class _Work:
    """A program under way."""

    source: bytes
    request: dict[str, Any]
    inputs: Sequence[bytes]
    limits: Limits
    passed: Verdict | None
    enough: Verdict | None
    deadline: float
    shared: bool
    """Whether a test may run where another has run."""
    outcomes: list[Outcome] = field(default_factory=list)
    over: bool = False
    """No more tests are run."""

    @property
    def left_seconds(self) -> float:
        """Of the program's whole time."""
        return self.deadline - time.monotonic()

    def take(self, outcome: Outcome, *, last: bool = False) -> None:
        """Keep the outcome of a test that counts."""
        self.outcomes.append(outcome)
        index = len(self.outcomes) - 1
        self.over = last or len(self.outcomes) == len(self.inputs)
        self.over = bool(self.enough and self.enough(index, outcome)) or self.over


class Slot:
    """A Sandbox: a process that waits for programs, started with the first of them and again where it was lost."""

    def __init__(self, start: Callable[[], Zygote], **constants: Any) -> None:
        self._start = start
        self._zygote: Zygote | None = None
        self._constants = {"descriptors": _DESCRIPTORS, **constants}
        self.starts = 0
        """How often its process has been started."""

    @property
    def process_id(self) -> int | None:
        """Of its process, where it has one."""
        return self._zygote.process.pid if self._zygote else None

    def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        *,
        limits: Limits = DEFAULT_LIMITS,
        passed: Verdict | None = None,
        enough: Verdict | None = None,
    ) -> list[Outcome]:
        """As `Sandbox.run` says."""
        source = _encoded(program.source)
        work = _Work(
            source=source,
            request=self._request(program, limits),
            inputs=inputs,
            limits=limits,
            passed=passed,
            enough=enough,
            deadline=time.monotonic() + limits.total_seconds,
            shared=passed is not None,
            over=not inputs,
        )
        if inputs and len(source) > limits.source_bytes:
            work.take(_too_long(source, limits), last=True)
        while not work.over:
            with self._closed_on_error():
                try:
                    self._run_some(work, self._alive())
                except LostError as error:
                    self.close()
                    if not work.over:
                        work.take(Outcome(status="contained", note=f"the sandbox was lost: {error}"), last=True)
        return work.outcomes + [Outcome(status="skipped")] * (len(inputs) - len(work.outcomes))

    def run_check(self, program: Program, check: str, *, limits: Limits = DEFAULT_LIMITS) -> Outcome:
        """As `Sandbox.run_check` says."""
        source = _encoded(program.source)
        if len(source) > limits.source_bytes:
            return _too_long(source, limits)
        with self._closed_on_error():
            try:
                return self._run_pair(program, source, _encoded(check), limits)
            except LostError as error:
                self.close()
                return Outcome(status="contained", note=f"the sandbox was lost: {error}")

    def close(self) -> None:
        """End the sandbox and every process in it; the next program starts another."""
        if self._zygote is not None:
            zygote, self._zygote = self._zygote, None
            zygote.close()

    def _alive(self) -> Zygote:
        if self._zygote is not None and not self._zygote.alive:
            self.close()
        if self._zygote is None:
            self._zygote = self._start()
            self.starts += 1
        return self._zygote

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """What ends the block, a time limit's exception too, ends the sandbox: it may be in the midst of a test."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _request(self, program: Program, limits: Limits, **other: Any) -> dict[str, Any]:
        return {
            "who": "program",
            "mode": program.mode,
            "entry": program.entry,
            "prelude": program.prelude,
            "cpu": limits.cpu_seconds,
            "wall": limits.wall_seconds,
            "total": limits.total_seconds,
            "memory": limits.memory_bytes,
            "output": limits.output_bytes,
            "threads": limits.threads,
            "recursion": limits.recursion,
            **self._constants,
            **other,
        }

    def _run_some(self, work: _Work, zygote: Zygote) -> None:
        """Run tests in one set of namespaces, until a file is left there or the program is done with."""
        if work.left_seconds <= 0:
            work.take(Outcome(status="timeout", note="the time of all tests of the program was up"), last=True)
            return
        with Channels(work.source) as channels:
            zygote.ask([work.request | {"total": work.left_seconds}], channels.theirs)
            channels.close_theirs()
            fresh, going_on = not work.shared, True
            while going_on and not work.over:
                fresh, going_on = self._test(work, zygote, channels, fresh)
            zygote.command(b"end")
            _await_end(zygote)

    def _test(self, work: _Work, zygote: Zygote, channels: Channels, fresh: bool) -> tuple[bool, bool]:
        """One test; whether the next needs a process of its own, and whether it can be asked for here."""
        index = len(work.outcomes)
        try:
            channels.begin(work.inputs[index])
        except OSError as error:
            raise LostError(f"the input cannot be handed over ({error.strerror})") from None
        zygote.command(b"fresh" if fresh else b"test")
        report = zygote.receive(max(work.left_seconds, 0) + _GRACE_SECONDS)
        _raise_if_broken(report)
        if "end" in report:
            raise LostError("the program's minder has ended")
        if "first" not in report:
            work.take(unanswered(report), last=True)
            return False, False
        outcome = outcome_of(report, channels.answers(work.limits))
        going_on = not report["left_files"]
        if work.shared and work.passed is not None and not work.passed(index, outcome):
            # Of what shares a process only a pass is believed, and from here on each test has its own.
            work.shared = False
            if not report["first"]:
                return True, going_on
        work.take(outcome)
        return not work.shared, going_on

    def _run_pair(self, program: Program, source: bytes, check: bytes, limits: Limits) -> Outcome:
        """A program and its trusted test beside it, joined by a socket pair."""
        zygote = self._alive()
        ends = socket.socketpair()
        with ends[0], ends[1], Channels(source) as tested, Channels(check) as testing:
            tested.begin(b"")
            testing.begin(b"")
            count = {"descriptors": _DESCRIPTORS + 1}
            requests = [
                self._request(program, limits, **count | {"mode": "linked"}),
                self._request(program, limits, **count | {"mode": "check", "who": "check"}),
            ]
            descriptors = [*tested.theirs, ends[0].fileno(), *testing.theirs, ends[1].fileno()]
            zygote.ask(requests, descriptors)
            for one in (*ends, tested, testing):
                one.close_theirs() if isinstance(one, Channels) else one.close()
            reports = _await_end(zygote, limits.total_seconds + _GRACE_SECONDS)
            outcomes = {
                who: outcome_of(report, channels.answers(limits)) if "first" in report else unanswered(report)
                for who, channels in (("program", tested), ("check", testing))
                for report in (reports.get(who, {"status": "contained"}),)
            }
        return _of_check(outcomes["program"], outcomes["check"])


def _of_check(program: Outcome, check: Outcome) -> Outcome:
    """What a trusted test says: its own process alone can say that a program passed."""
    if check.note == f"exit {runner.UNSUPPORTED}":
        return replace(check, status="unusable", note=last_line(check.stderr))
    if check.status != "done" and program.status != "done":
        return program
    used = program.cpu_seconds + check.cpu_seconds
    return Outcome(
        status=check.status,
        stdout=program.stdout,
        stderr=check.stderr,
        cpu_seconds=used,
        wall_seconds=check.wall_seconds,
        peak_bytes=program.peak_bytes,
        note=check.note,
    )


def _await_end(zygote: Zygote, seconds: float = _GRACE_SECONDS) -> dict[str, dict[str, Any]]:
    """The reports that come, by whose they are, until the slot is free again."""
    reports: dict[str, dict[str, Any]] = {}
    while not (report := zygote.receive(seconds)).get("end"):
        _raise_if_broken(report)
        reports.setdefault(report["who"], report)
    return reports


def _raise_if_broken(report: dict[str, Any]) -> None:
    """What is no fault of a program is told, never scored."""
    if report.get("status") == "prelude":
        raise RewardError(f"the prelude of a program fails: {report['note']}")
    if report.get("status") == "failed":
        why = f"the sandbox cannot set up a program ({report['note']})"
        raise RewardError(f"{why}: {remedy(report['note'])}")


def _encoded(source: str) -> bytes:
    return source.encode("utf-8", "surrogatepass")


def _too_long(source: bytes, limits: Limits) -> Outcome:
    return Outcome(
        status="compile", note=f"{len(source)} bytes of source, and {limits.source_bytes} are the most that are run"
    )
