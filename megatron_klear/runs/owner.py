"""One run an output folder: a lock that dies with the process that holds it, so that a killed run can resume at once.

The lock is a POSIX record lock (fcntl.lockf). Unlike flock it is not inherited by forked processes: a checkpoint writer
that outlives rank 0 by a moment does not keep it. It is lost when its process closes any descriptor of the file, so
nobody else in the owner may open `.owner`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from megatron_klear.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class FolderInUse(UserError):
    """Another run has this output folder."""

    exit_code = 2


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold `folder`, which exists, for this process while the block runs.

    On a file system without locks a file `.owner.held` stands for the lock; it is taken over only when its process is
    known to be gone from this host. Raises FolderInUse, naming process, host and start of the run that is there.
    """
    descriptor = os.open(folder / ".owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    held = None
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise FolderInUse(_refusal(folder, os.pread(descriptor, 4096, 0))) from None
            if error.errno not in _NO_LOCKS:
                raise
            held = _hold_by_file(folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _this_process(), 0)
        yield
    finally:
        if held is not None:
            held.unlink(missing_ok=True)
        os.close(descriptor)


def _hold_by_file(folder: Path) -> Path:
    path = folder / ".owner.held"
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # its run has just ended
                continue
            if not _is_gone(content):
                raise FolderInUse(
                    f"{_refusal(folder, content)}. The file system has no locks: if that process is gone, remove {path}"
                ) from None
            _remove(path, content)
        else:
            os.write(descriptor, _this_process())
            os.close(descriptor)
            return path
    raise FolderInUse(f"several runs are being started in {folder} at once; start one")


def _remove(path: Path, content: bytes) -> None:
    """Remove the file unless another run, started at the same moment, has taken it over since `content` was read."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if aside.read_bytes() == content:
            aside.unlink()
        else:
            aside.rename(path)


def _this_process() -> bytes:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "ticks": _start_ticks(os.getpid())}
    return json.dumps(owner).encode()


def _is_gone(content: bytes) -> bool:
    """Whether the process that wrote this is known not to run: on this host, and no process has its id and start."""
    try:
        owner = json.loads(content)
        pid, ticks = int(owner["pid"]), owner["ticks"]
        return bool(owner["host"] == socket.gethostname() and ticks is not None and _start_ticks(pid) != ticks)
    except (ValueError, KeyError, TypeError):
        return False


def _start_ticks(pid: int) -> str | None:
    """When the process was started, in clock ticks since boot; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _refusal(folder: Path, content: bytes) -> str:
    try:
        owner = json.loads(content)
        who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        who = "it has just been started"
    return f"a run is in output {folder} ({who}); wait for it, end it, or choose another output"
