"""The kernel's calls that Python's library lacks. Each raises OSError where the kernel refuses."""

from __future__ import annotations

import ctypes
import os
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_USERS, NEW_PIDS = 0x20000, 0x10000000, 0x20000000
_PLAIN_MOUNT = 2 | 4 | 8  # nosuid, nodev, noexec
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _DROP_BOUNDING, _NO_NEW_PRIVILEGES = 1, 4, 22, 24, 38
_KEEP_CAPABILITIES, _SET_SUBREAPER = 8, 36
_LAST_CAPABILITY = 63
_READ_ALL = 1 << 2  # CAP_DAC_READ_SEARCH
_CAPABILITIES_VERSION = 0x20080522
_CAPSET = {"x86_64": 126, "aarch64": 91}
MACHINE = os.uname().machine


def checked(result: int, what: str) -> int:
    """The result of a C call; OSError with `what` where it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare() -> None:
    """Give this process namespaces of users and mounts of its own, and its children one of processes."""
    user, group = os.getuid(), os.getgid()
    checked(LIBC.unshare(NEW_USERS | NEW_MOUNTS | NEW_PIDS), "unshare")
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{user} {user} 1")
    write("/proc/self/gid_map", f"{group} {group} 1")


def mount(kind: str, where: str, options: str = "") -> None:
    """Mount an empty file system of that kind, without devices and programs."""
    mounted = LIBC.mount(kind.encode(), where.encode(), kind.encode(), _PLAIN_MOUNT, options.encode())
    checked(mounted, f"mount {kind} on {where}")


def become(uid: int, *, read_all: bool = False) -> None:
    """Leave root for good, for a user that owns nothing; with `read_all` it may read every file all the same."""
    for capability in range(_LAST_CAPABILITY + 1):
        LIBC.prctl(_DROP_BOUNDING, capability, 0, 0, 0)  # EINVAL for those that this kernel does not know
    if read_all:
        checked(LIBC.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0), "keep capabilities")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    drop_capabilities(_READ_ALL if read_all else 0)


def drop_capabilities(kept: int = 0) -> None:
    """Lose every capability but those in the bit mask `kept`."""
    low, high = kept & 0xFFFFFFFF, kept >> 32
    header = struct.pack("<Ii", _CAPABILITIES_VERSION, 0)
    data = struct.pack("<6I", low, low, 0, high, high, 0)
    checked(LIBC.syscall(_CAPSET[MACHINE], header, data), "capset")


def forbid_new_privileges() -> None:
    """No program that this process starts has more rights than it; filters of system calls ask for it."""
    checked(LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")


def set_dumpable(value: bool) -> None:
    """Whether processes of the same user may look into this one."""
    checked(LIBC.prctl(_SET_DUMPABLE, int(value), 0, 0, 0), "dumpable")


def die_with_parent(signal_number: int) -> None:
    """Be sent a signal when the parent's thread that made this process ends."""
    checked(LIBC.prctl(_SET_DEATH_SIGNAL, signal_number, 0, 0, 0), "parent death signal")


def adopt_orphans() -> None:
    """Become the parent of what the descendants of this process leave behind."""
    checked(LIBC.prctl(_SET_SUBREAPER, 1, 0, 0, 0), "child subreaper")


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class Filter:
    """A seccomp filter, ready to be loaded by this process and its children."""

    def __init__(self, instructions: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(instructions, len(instructions))
        self._program = _FilterProgram(len(instructions) // 8, ctypes.addressof(self._buffer))
        self._reference = ctypes.byref(self._program)

    def load(self) -> None:
        """Hold this thread and all that it starts to the filter, for good."""
        checked(LIBC.prctl(_SET_SECCOMP, 2, self._reference, 0, 0), "seccomp")


def write(path: str, text: str) -> None:
    """Write to a file of the kernel in one call."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def process_clock(pid: int) -> int:
    """The clock of the computing time of a process, for time.clock_gettime (clock_getcpuclockid of the C library)."""
    return ((~pid) << 3) | 2
