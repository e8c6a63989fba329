"""Runs a command so that nothing of it outlives the process that asked for it, even when that one is SIGKILLed.

    python supervisor.py PARENT_PID GRACE_SECONDS COMMAND...

Ends with the command's exit code, after whatever the command left behind is dead. SIGTERM goes on to the command,
which has GRACE_SECONDS to end; SIGQUIT kills at once. Standard library alone, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_SECONDS = 0.3
_WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILLED = 128 + signal.SIGKILL
_CLEANING_SECONDS = 3.0


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, itself not among them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, open_ends = [], [pid]
    while open_ends:
        below = children.get(open_ends.pop(), [])
        found += below
        open_ends += below
    return found


def _is_resource_tracker(pid: int) -> bool:
    """Whether this is the process with which Python removes the shared memory of processes that were killed."""
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _reap(codes: dict[int, int]) -> None:
    """Collect the exit codes of all children that ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        codes[pid] = os.waitstatus_to_exitcode(status)


def _kill_all(codes: dict[int, int]) -> None:
    """Kill every descendant, also those born meanwhile, and wait until none is left."""
    patience = time.monotonic() + _CLEANING_SECONDS
    while left := descendants(os.getpid()):
        for pid in left:
            if time.monotonic() < patience and _is_resource_tracker(pid):
                continue  # it ends by itself once those that it cleans up after are dead
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        _reap(codes)


def supervise(parent: int, grace_seconds: float, command: list[str]) -> int:
    """Run `command` until it ends, is told to, or `parent` is gone; returns its exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Orphans below come to this process instead of to init, and are found among its descendants.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=prepare)
    codes: dict[int, int] = {}
    deadline = float("inf")
    while server.pid not in codes and time.monotonic() < deadline:
        told = signal.sigtimedwait(_WATCHED, POLL_SECONDS)
        # Asked for anew each time: the death signal of prctl follows the thread that forked, not its process.
        if os.getppid() != parent or (told is not None and told.si_signo == signal.SIGQUIT):
            break
        if told is not None and told.si_signo in (signal.SIGTERM, signal.SIGINT):
            os.kill(server.pid, signal.SIGTERM)
            deadline = min(deadline, time.monotonic() + grace_seconds)
        _reap(codes)
    _kill_all(codes)
    code = codes.get(server.pid, _KILLED)
    server.returncode = code  # reaped above, not by its object
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
