"""Landlock: a process gives up the file system, but for what it is told that it may read."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

from . import system

NEEDED_VERSION = 3
"""Of Landlock, that of Linux 6.2: before it a file opened for reading could be emptied."""
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIRECTORY = 1 << 1, 1 << 2, 1 << 3
_FILE_RIGHTS = {3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights to files by the first version that knows them."""
_TCP, _SIGNALS_AND_SOCKETS = 3, 3


def version() -> int:
    """The kernel's version of Landlock; 0 where it has none or it is switched off."""
    return max(0, int(system.LIBC.syscall(_CREATE, None, 0, 1)))


def restrict(readable: Iterable[str], devices: Iterable[str]) -> None:
    """Forbid this process all files but those below `readable`, and to write to any but `devices`, for good.

    Where the kernel knows them, connections and signals to others as well. Raises OSError.
    """
    known = version()
    handled = max((rights for first, rights in _FILE_RIGHTS.items() if first <= known), default=0)
    attributes = struct.pack("<QQQ", handled, _TCP, _SIGNALS_AND_SOCKETS)
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    ruleset = system.checked(system.LIBC.syscall(_CREATE, attributes, size, 0), "landlock_create_ruleset")
    try:
        for path in readable:
            _allow(ruleset, path, _READ_FILE | (_READ_DIRECTORY if Path(path).is_dir() else 0))
        for path in devices:
            _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
        system.checked(system.LIBC.syscall(_RESTRICT, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        beneath = struct.pack("<Qi", rights, descriptor)
        system.checked(system.LIBC.syscall(_ADD, ruleset, _PATH_BENEATH, beneath, 0), f"landlock_add_rule {path}")
    finally:
        os.close(descriptor)
