"""Mistakes that a person can mend: told in words, without a traceback, with an exit code that is not 0."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """Base of errors whose message names what is wrong, where, and the remedy."""

    exit_code = 1


class RunLeft(UserError):
    """A run that was asked to stop has saved its checkpoint and leaves; the exit code is 128 + the signal."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with the message alone when the block raises a UserError or meets a full disk.

    The exit code is the error's, 1 unless it says otherwise, and 130 after Ctrl-C. Other exceptions keep their
    traceback: they are ours to mend. One of several processes ends at once, without Python's clean-up: taking down
    NCCL while the other ranks wait in a collective never returns. torchrun ends the others.
    """
    configure_logging()
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        shown, code = getattr(error, "_told", False), _exit_code(error)
        tell(error)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if code is None and not shown:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 1)
        if code is None and not shown:
            raise
        raise SystemExit(code or 1) from None


@contextmanager
def told_at_once() -> Iterator[None]:
    """Print what ends the block before anything round it is closed, which may take long or wait for other ranks.

    The sentence of an error that has one, the traceback of others; `exit_on_error` does not print it again.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        tell(error)
        if _exit_code(error) is None and not getattr(error, "_told", False):
            error._told = True  # type: ignore[attr-defined]
            print(f"error (rank {os.environ.get('RANK', '0')}):", file=sys.stderr)
            traceback.print_exception(error)
            sys.stderr.flush()
        raise


def configure_logging() -> None:
    """Show this package's messages: from INFO up on rank 0, from ERROR up on the others. A tool calls it once."""
    package = logging.getLogger(__package__)
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)


def tell(error: BaseException) -> None:
    """Print an error's sentence to stderr, once however often it is told; nothing for errors that have none."""
    rank = os.environ.get("RANK", "0")
    if _exit_code(error) is None or getattr(error, "_told", False):
        return
    error._told = True  # type: ignore[attr-defined]
    if isinstance(error, RunLeft):
        text = str(error) if rank == "0" else ""
    elif isinstance(error, KeyboardInterrupt):
        # A training run takes Ctrl-C itself from its first step on; an evaluation or a draw has saved as it went.
        text = "interrupted; what was saved until now is kept: start the same command again to go on"
        text = text if rank == "0" else ""
    elif isinstance(error, UserError):
        text = f"error (rank {rank}): {error}"
    else:
        text = (
            f"error (rank {rank}): {error}; check the free space and the permissions there, "
            "then start the run again: it goes on from its newest checkpoint"
        )
    if text:
        print(text, file=sys.stderr, flush=True)


def _exit_code(error: BaseException) -> int | None:
    """None for what keeps its traceback."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 1 if isinstance(error, OSError) and error.errno in _STORAGE else None
