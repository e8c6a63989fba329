"""Mistakes that a person can mend: told in words, without a traceback, with an exit code that is not 0."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """Base of errors whose message names what is wrong, where, and the remedy."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with exit code 1 and the message alone when the block raises a UserError or meets a full disk.

    Other exceptions keep their traceback: they are ours to mend.
    """
    try:
        yield
    except UserError as error:
        print(f"error (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        print(
            f"error (rank {os.environ.get('RANK', '0')}): {error}; check the free space and the permissions there, "
            "then start the run again: it goes on from its newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from None
