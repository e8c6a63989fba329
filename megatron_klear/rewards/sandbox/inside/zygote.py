"""Z, a warm interpreter that waits for programs, and M, which minds one."""

from __future__ import annotations

import _thread

# What programs use most, so that each finds it loaded. threading and asyncio are not here: what they do after each
# fork costs as much as a small program.
import bisect
import collections
import contextlib
import copy
import functools
import gc
import heapq
import importlib
import itertools
import json
import math
import operator
import os
import random
import re
import resource
import select
import signal
import socket
import string
import sys
import typing
from pathlib import Path
from typing import Any

from . import check, keeper, system

WARM = (bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, typing, check)
_MOST_DESCRIPTORS = 16
_MESSAGE_BYTES = 1 << 17
_THREAD_STACK_BYTES = 8 << 20
_MOST_PRELUDES = 8
_OUT_OF_MEMORY_FIRST = "1000"


def main(arguments: list[str]) -> None:
    """Become nobody, say that all is ready, and serve programs until the outside is gone."""
    descriptor, user, namespaces, read_all = (int(argument) for argument in arguments[:4])
    packages = arguments[4:]
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS):  # the grading process's own, which it may have met already
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    if user:
        if namespaces:
            system.mount("proc", "/proc")  # bubblewrap's own has parts covered, and the kernel then refuses another
        system.become(user, read_all=bool(read_all))
    system.die_with_parent(signal.SIGKILL)
    system.adopt_orphans()
    system.forbid_new_privileges()
    system.set_dumpable(True)  # or a minder could not map its user
    with contextlib.suppress(OSError):
        system.write("/proc/self/oom_score_adj", _OUT_OF_MEMORY_FIRST)
    _thread.stack_size(_THREAD_STACK_BYTES)  # glibc's default is the limit on the main thread's, which is large
    _load(packages)
    control = socket.socket(fileno=descriptor)
    gc.collect()
    gc.freeze()
    keeper.reply(control, {"ready": os.getpid()})
    preludes: dict[str, dict[str, Any]] = {}
    while True:
        content, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, _MOST_DESCRIPTORS)
        if not content:
            return
        if not descriptors:  # what a program that ended early has not read
            continue
        serve(control, json.loads(content), descriptors, preludes)
        for one in descriptors:
            os.close(one)
        keeper.reply(control, {"end": True})


def _load(packages: list[str]) -> None:
    """Import packages, each given by its folder or file, for the programs that will ask for them."""
    for place in map(Path, packages):
        sys.path.append(str(place.parent))
        importlib.import_module(place.stem)
        sys.path.remove(str(place.parent))


def serve(
    control: socket.socket, requests: list[dict[str, Any]], descriptors: list[int], preludes: dict[str, dict[str, Any]]
) -> None:
    """Run one program, or a program and its trusted test beside it, to its end."""
    minders, taken = [], 0
    for request in requests:
        own = descriptors[taken : taken + request["descriptors"]]
        taken += request["descriptors"]
        try:
            names = _names(request["prelude"], preludes)
        except Exception as error:
            keeper.reply(control, {"status": "prelude", "note": f"{type(error).__name__}: {error}"[:300]})
            break
        pid = os.fork()
        if pid == 0:
            for other in set(descriptors) - set(own):
                os.close(other)
            mind(request, control, own, names)
        minders.append(pid)
    for one in descriptors[:]:
        os.close(one)
    descriptors.clear()
    for pid in minders:
        _await(pid, control)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _await(minder: int, control: socket.socket) -> None:
    """Wait for a minder; end at once, and with this process all that it started, where the outside has gone.

    The signal of a parent's death does not do: bubblewrap, the parent, has no right to signal another user.
    """
    handle = os.pidfd_open(minder)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(control, 0)  # tells of its end alone
    if handle not in [descriptor for descriptor, _ in poll.poll()]:
        os._exit(0)
    os.close(handle)
    os.waitpid(minder, 0)


def _names(prelude: str, preludes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The names that a prelude leaves, executed once."""
    if not prelude:
        return {}
    if prelude not in preludes:
        if len(preludes) >= _MOST_PRELUDES:
            preludes.pop(next(iter(preludes)))
        preludes[prelude] = keeper.prelude_names(prelude)
        gc.collect()
        gc.freeze()
    return preludes[prelude]


def mind(request: dict[str, Any], control: socket.socket, descriptors: list[int], names: dict[str, Any]) -> None:
    """M: start a program's keeper in namespaces of its own, and end both when the program's time is up."""
    try:
        if request["namespaces"]:
            system.unshare()
        else:
            system.die_with_parent(signal.SIGKILL)
        pid = os.fork()
        if pid == 0:
            _be_keeper(request, control, descriptors, names)
        for one in descriptors:
            os.close(one)
        poll = select.poll()
        poll.register(os.pidfd_open(pid), select.POLLIN)
        in_time = bool(poll.poll(1000 * request["total"]))
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if status:
            keeper.reply(control, {"status": "ended", "who": request["who"], "wait": status, "in_time": in_time})
    except BaseException as error:
        _fail(control, request, error)
    finally:
        os._exit(0)


def _be_keeper(request: dict[str, Any], control: socket.socket, descriptors: list[int], names: dict[str, Any]) -> None:
    try:
        os.setsid()  # a process group reaches across namespaces: kill(0, SIGKILL) would end the minder
        keeper.keep(request, control, descriptors, names)
    except BaseException as error:
        _fail(control, request, error)
    finally:
        os._exit(0)


def _fail(control: socket.socket, request: dict[str, Any], error: BaseException) -> None:
    with contextlib.suppress(OSError):
        keeper.reply(control, {"status": "failed", "who": request["who"], "note": repr(error)[:300]})
