"""How a test ended, from what the sandbox's trusted part measured."""

from __future__ import annotations

import os
import signal
from typing import Any

from .inside import runner
from .outcome import Outcome, Status

_BY_SIGNAL: dict[int, tuple[Status, str]] = {
    signal.SIGSYS: ("contained", "it made a system call that programs may not make"),
    signal.SIGXFSZ: ("output", "it wrote more than it may"),
    signal.SIGXCPU: ("timeout", "its computing time was up"),
}
_NOTE = 300


def outcome_of(report: dict[str, Any], answers: tuple[bytes, bytes, bytes]) -> Outcome:
    """The outcome of a test that was run to its end, whatever end that was."""
    stdout, stderr, result = answers
    status, note = _ending(report, stderr)
    return Outcome(
        status=status,
        stdout=stdout,
        stderr=stderr,
        result=result,
        cpu_seconds=report["cpu"],
        wall_seconds=report["wall"],
        peak_bytes=report["peak"],
        note=note,
    )


def unanswered(report: dict[str, Any]) -> Outcome:
    """The outcome of the test that a program's keeper was asked for and did not run."""
    if report["status"] == "compile":
        return Outcome(status="compile", note=report["note"])
    if report["status"] != "ended":
        return Outcome(status="contained", note=str(report.get("note", "the program's keeper has ended")))
    if not report["in_time"]:
        return Outcome(status="timeout", note="the time of all tests of the program was up")
    number = os.WTERMSIG(report["wait"]) if os.WIFSIGNALED(report["wait"]) else 0
    if number == signal.SIGXCPU:
        return Outcome(status="compile", note="compiling it took longer than a test may")
    if number in (signal.SIGSEGV, signal.SIGABRT):
        return Outcome(status="compile", note=f"the compiler ended by {signal.Signals(number).name}")
    return Outcome(status="contained", note="the program's keeper has ended")


def _ending(report: dict[str, Any], stderr: bytes) -> tuple[Status, str]:
    if report["status"] == "timeout":
        return "timeout", f"not done after {report['cpu']:.1f} s of computing and {report['wall']:.1f} s by the clock"
    wait = report["wait"] or 0
    if os.WIFSIGNALED(wait):
        number = os.WTERMSIG(wait)
        return _BY_SIGNAL.get(number, ("crashed", f"ended by {_signal_name(number)}"))
    code = os.WEXITSTATUS(wait)
    if code == runner.NO_MEMORY:
        return "memory", "it asked for more memory than it may have"
    if code == runner.EXCEPTION:
        return "crashed", last_line(stderr) or "an exception"
    return ("crashed", f"exit {code}") if code else ("done", "")


def last_line(text: bytes) -> str:
    """The last line of a traceback, in which the error stands."""
    lines = text[-4 * _NOTE :].decode(errors="replace").strip().splitlines()
    return lines[-1][:_NOTE] if lines else ""


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.Signals._value2member_map_ else f"signal {number}"
