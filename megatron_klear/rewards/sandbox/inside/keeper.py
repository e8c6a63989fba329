"""P: sets up one program's limits, compiles it, and gives each test its process, its time and its end."""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import gc
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any

from . import landlock, runner, seccomp, system

_PROGRAM_FILTERS = {
    namespaces: system.Filter(seccomp.program_filter(system.MACHINE, namespaces=namespaces))
    for namespaces in (True, False)
}
_NO_NEW_PROCESSES = system.Filter(seccomp.no_new_processes(system.MACHINE))
LINKED = ("linked", "check")
"""Modes of the two programs of a trusted test; each is one test."""
WRITABLE = ("/tmp", "/dev/shm")
_TEMPORARY = "size=16m,nr_inodes=1k"
_STREAMS = 4
_ABOVE_ALL = 20
_MAX_FILES = 64
_LOOK_SECONDS = 0.25
"""How often computing time is read: threads may use it faster than the clock runs."""


def reply(control: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Tell the outside something."""
    socket.send_fds(control, [json.dumps(message).encode()], descriptors)


def keep(request: dict[str, Any], control: socket.socket, descriptors: list[int], names: dict[str, Any]) -> None:
    """Set up and serve one program; `descriptors` are its source, its four streams and, in a pair, the link.

    This process is the first of the program's namespaces, where it has some.
    """
    if request["namespaces"]:
        for place in WRITABLE:
            system.mount("tmpfs", place, _TEMPORARY)
        system.mount("proc", "/proc", "hidepid=2,subset=pid")
        system.drop_capabilities()
    else:
        system.die_with_parent(signal.SIGKILL)
    os.chdir("/tmp" if request["namespaces"] else "/")
    system.set_dumpable(False)
    _limit(request)
    control = socket.socket(fileno=fcntl.fcntl(control.detach(), fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL))
    source = _arrange(descriptors)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    runner.open_streams()
    sys.argv[:] = ["main.py"]
    _PROGRAM_FILTERS[request["namespaces"]].load()
    try:
        code = compile(source, "main.py", "exec", dont_inherit=True)
    except BaseException as error:
        reply(control, {"status": "compile", "who": request["who"], "note": _words(error)})
        return
    del source
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    sys.setrecursionlimit(request["recursion"])
    sys.set_int_max_str_digits(0)
    if request["mode"] != "check":
        # Names that a program may use and has not defined: what it defines is in its own module.
        for name in names.keys() - builtins.__dict__.keys():
            setattr(builtins, name, names[name])
        names = {}
    job = runner.Job(code, request["mode"], request["entry"], names, request["recursion"])
    gc.freeze()  # a collection would touch, and so copy, the whole heap
    try:
        Keeper(request, control, job).serve()
    except (OSError, MemoryError) as error:  # such as no memory left beside a large program
        reply(control, {"status": "contained", "who": request["who"], "note": _words(error)})


def _words(error: BaseException) -> str:
    """What is wrong, printable whatever the source holds."""
    try:
        words = f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        words = type(error).__name__
    return words.encode(errors="backslashreplace").decode()


def _limit(request: dict[str, Any]) -> None:
    """The limits of P and of all that it starts; the one on computing time is for the compiler alone."""
    for name, value in {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_NOFILE: _MAX_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_FSIZE: request["output"],
    }.items():
        _lower(name, value)
    if request["user_processes"]:  # else the user has others, whose number is not known
        _lower(resource.RLIMIT_NPROC, request["threads"] + request["user_processes"])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(request["cpu"]) + 1, hard))


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _arrange(descriptors: list[int]) -> bytes | str:
    """Put the streams where a program has them; the source's text."""
    kept = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL) for one in descriptors]
    for one in descriptors:
        os.close(one)
    source = os.pread(kept[0], os.fstat(kept[0]).st_size, 0).decode("utf-8-sig", "surrogateescape")
    for number, one in enumerate(kept[1 : 1 + _STREAMS]):
        os.dup2(one, number)
    if len(kept) > 1 + _STREAMS:
        os.dup2(kept[-1], runner.LINK)
    for one in kept:
        os.close(one)
    return source


class _Process:
    """A test's process, T."""

    def __init__(self, job: runner.Job, request: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        self.channel = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL)
        ours.close()
        other = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL)
        theirs.close()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._become_test(job, other, request, parent)
        os.close(other)
        if job.mode == "check":
            os.close(runner.LINK)  # the program is to see when its test has ended
        self.handle = os.pidfd_open(self.pid)
        self.clock = system.process_clock(self.pid)
        self.first, self.used_before = True, 0.0
        self.poll = select.poll()
        self.poll.register(self.channel, select.POLLIN)
        self.poll.register(self.handle, select.POLLIN)
        if job.mode == "linked":
            self.poll.register(runner.LINK, 0)  # tells of its end alone

    @staticmethod
    def _become_test(job: runner.Job, channel: int, request: dict[str, Any], parent: int) -> None:
        try:
            os.setsid()  # signals to its group reach nobody else
            os.dup2(channel, runner.CHANNEL)
            os.closerange(runner.LINK + (job.mode in LINKED), _MAX_FILES)
            if not request["namespaces"]:
                system.die_with_parent(signal.SIGKILL)
                if os.getppid() != parent:  # it has ended before, and may have said that the test begins
                    os._exit(runner.NOT_READY)
                landlock.restrict([*request["readable"], "/proc/self"], request["devices"])
                system.Filter(seccomp.no_foreign_signals(system.MACHINE, os.getpid())).load()
            _NO_NEW_PROCESSES.load()
        except BaseException:
            os._exit(runner.NOT_READY)
        runner.run_tests(job)

    def end(self) -> tuple[int, resource.struct_rusage]:
        """Kill it, if it lives; how it ended and what it used."""
        os.kill(self.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        os.close(self.channel)
        os.close(self.handle)
        return status, usage


class Keeper:
    """Serves the tests that the outside asks for, one at a time; "fresh" asks for a new process."""

    def __init__(self, request: dict[str, Any], control: socket.socket, job: runner.Job) -> None:
        self.request, self.control, self.job = request, control, job
        self.process: _Process | None = None
        self.linked = request["mode"] in LINKED
        self.free = self._free_inodes()

    def serve(self) -> None:
        """Until the outside says that it is enough, or a file was left: then the rest needs new namespaces."""
        while (command := b"test" if self.linked else self.control.recv(64)) in (b"test", b"fresh"):
            if command == b"fresh" and self.process:
                self.process.end()
                self.process = None
            process = self.process or _Process(self.job, self.request)
            report = self._run(process)
            self.process = process if report["wait"] is None else None
            if self.process and (command == b"fresh" or self.linked):
                _, usage = self.process.end()
                report["peak"], self.process = usage.ru_maxrss << 10, None
            report["left_files"] = self.free != self._free_inodes()
            reply(self.control, report)
            if report["left_files"] or self.linked:
                break
        if self.process and not self.request["namespaces"]:  # namespaces end with this process, and all in them
            self.process.end()

    def _run(self, process: _Process) -> dict[str, Any]:
        began, first = time.monotonic(), process.first
        process.first = False
        for stream in range(_STREAMS):
            os.lseek(stream, 0, os.SEEK_SET)
        with contextlib.suppress(OSError):
            os.write(process.channel, b"g")
        in_time, alive = self._wait(process, began)
        report: dict[str, Any] = {"status": "done" if in_time else "timeout", "first": first, "wait": None, "peak": 0}
        report["who"] = self.request["who"]
        if alive:
            used = time.clock_gettime(process.clock)
        else:
            report["wait"], usage = process.end()
            used, report["peak"] = usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10
        report["cpu"], report["wall"] = used - process.used_before, time.monotonic() - began
        process.used_before = used
        return report

    def _wait(self, process: _Process, began: float) -> tuple[bool, bool]:
        """Whether the test ended in time, and whether its process goes on."""
        while True:
            used = time.clock_gettime(process.clock) - process.used_before
            left = min(began + self.request["wall"] - time.monotonic(), self.request["cpu"] - used)
            if left <= 0:
                return False, False
            ready = [descriptor for descriptor, _ in process.poll.poll(1000 * min(left, _LOOK_SECONDS))]
            if process.handle in ready:
                return True, False
            if runner.LINK in ready:
                return True, True  # the test has what it wanted
            if process.channel in ready:
                if _read(process.channel) == runner.AGAIN:
                    return True, True
                process.poll.unregister(process.channel)  # it has closed it, and goes on until it ends

    def _free_inodes(self) -> list[int]:
        return [os.statvfs(place).f_ffree for place in WRITABLE] if self.request["namespaces"] else []


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1)
    except OSError:
        return b""


def prelude_names(prelude: str) -> dict[str, Any]:
    """The names that a trusted prelude leaves."""
    names: dict[str, Any] = {"__name__": "solution", "__builtins__": builtins}
    exec(compile(prelude, "prelude.py", "exec", dont_inherit=True), names)
    return names
