"""T: one program on test after test. From `exec` on nothing in this process is to be trusted."""

from __future__ import annotations

import _thread
import atexit
import builtins
import contextlib
import gc
import io
import json
import os
import sys
import traceback
import types
from collections.abc import Callable
from types import CodeType
from typing import Any

from . import values
from .link import answer_calls
from .proxy import Unsupported

EXCEPTION, NO_MEMORY, NOT_READY, UNSUPPORTED = 76, 77, 78, 79
"""Exit codes: an exception, told from an exit of the program's own; a MemoryError; the process was not made ready; a
trusted test does what it cannot."""
RESULT, CHANNEL, LINK = 3, 4, 5
"""Descriptors: the returned value, the keeper, the trusted test that calls this program."""
AGAIN = b"."
"""Said to the keeper: the test ended well, and nothing was seen that forbids another in this process."""
_Namespace = dict[str, Any]
_WRITERS = io.TextIOWrapper, io.BufferedWriter


class Job:
    """A compiled program and what to do with it."""

    def __init__(self, code: CodeType, mode: str, entry: str, names: _Namespace, recursion: int) -> None:
        self.code, self.mode, self.entry, self.names, self.recursion = code, mode, entry, names, recursion
        self.used = False


def open_streams() -> None:
    """Python's own streams on the descriptors 0, 1 and 2, from their beginning."""
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]


def run_tests(job: Job) -> None:
    """Run a test whenever the keeper says so, until one forbids the next. Never returns."""
    status = NOT_READY
    try:
        while os.read(CHANNEL, 1):
            status = run_test(job)
            if status or _thread._count():
                break
            os.write(CHANNEL, AGAIN)
    finally:
        os._exit(status)


def run_test(job: Job) -> int:
    """The exit code that a Python of its own would end with; threads have ended and buffers are flushed."""
    if job.used:
        open_streams()
        sys.setrecursionlimit(job.recursion)
    job.used = True
    streams = (sys.stdout, sys.stderr, sys.stdout.buffer, sys.stderr.buffer)
    try:
        status = _ending(lambda: _MODES[job.mode](job, _module(job)))
        if _thread._count() and "threading" in sys.modules:
            status = _ending(sys.modules["threading"]._shutdown) or status
        # A program that asks for this at its end writes its answer there.
        status = _ending(atexit._run_exitfuncs) or status
        return _ending(lambda: _flush(streams)) or status
    finally:
        atexit._clear()


def _ending(part: Callable[[], object]) -> int:
    """The exit code of Python where `part` is its program."""
    try:
        part()
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return int(leaving.code or 0) & 0xFF
        with contextlib.suppress(BaseException):
            print(leaving.code, file=sys.stderr)
        return 1
    except MemoryError:
        return NO_MEMORY
    except Unsupported as error:
        with contextlib.suppress(BaseException):
            print(error, file=sys.stderr)
        return UNSUPPORTED
    except BaseException as error:
        with contextlib.suppress(BaseException):
            _show(error)
        return EXCEPTION
    return 0


def _show(error: BaseException) -> None:
    """The traceback of the program's part alone."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


def _flush(streams: tuple[Any, ...]) -> None:
    """Write what waits in the program's streams, in others that it opened, and in the first ones beneath them."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            _flush_one(stream)
    with contextlib.suppress(MemoryError):
        opened = [one for one in gc.get_objects() if issubclass(type(one), _WRITERS)]  # none of before the test
        for kind in _WRITERS:
            for stream in [one for one in (*streams, *opened) if issubclass(type(one), kind)]:
                _flush_one(stream)


def _flush_one(stream: Any) -> None:
    try:
        stream.flush()
    except ValueError as error:  # it is closed, or was detached from what is beneath it
        if isinstance(error, UnicodeError) or type(stream) not in _WRITERS:
            raise


def _module(job: Job) -> _Namespace:
    """A new module's names. Programs that read standard input are the main one, and tests."""
    module = types.ModuleType("__main__" if job.mode in ("stdin", "check") else "solution")
    sys.modules[module.__name__] = module
    names = module.__dict__
    names.update(job.names)
    names.update(__name__=module.__name__, __file__="/tmp/main.py", __builtins__=builtins)
    return names


def _run_whole(job: Job, names: _Namespace) -> None:
    exec(job.code, names)


def _run_call(job: Job, names: _Namespace) -> None:
    arguments = values.decode(_input())
    exec(job.code, names)
    _give(function_of(names, job.entry)(*arguments))


def _run_expression(job: Job, names: _Namespace) -> None:
    asked = json.loads(_input())
    exec(job.code, names)
    for name in asked.get("asks", ()):
        if name not in names:
            raise NameError(f"the program defines no {name!r}")
    exec(asked["setup"], names)
    _give(eval(asked["expression"], names))


def _run_linked(job: Job, names: _Namespace) -> None:
    exec(job.code, names)
    if job.entry:
        function_of(names, job.entry)
    answer_calls(LINK, names, lambda *given, **named: function_of(names, job.entry)(*given, **named))


def _run_check(job: Job, names: _Namespace) -> None:
    from .check import run_check

    run_check(job.code, LINK, names, job.entry)


_MODES: dict[str, Callable[[Job, _Namespace], None]] = {
    "stdin": _run_whole,
    "call": _run_call,
    "expression": _run_expression,
    "linked": _run_linked,
    "check": _run_check,
}


def function_of(names: _Namespace, entry: str) -> Any:
    """The method of that name of a new Solution where it has one, else the function."""
    owner = names.get("Solution")
    if owner is not None and hasattr(owner, entry):
        return getattr(owner(), entry)
    if entry not in names:
        raise NameError(f"the program defines no {entry!r}")
    return names[entry]


def _input() -> bytes:
    """All of standard input, which is then at its end for the program."""
    size = os.lseek(0, 0, os.SEEK_END)
    return os.pread(0, size, 0)


def _give(value: object) -> None:
    content = memoryview(values.encode(value))
    while content:
        content = content[os.write(RESULT, content) :]
