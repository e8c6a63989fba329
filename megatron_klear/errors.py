"""Mistakes that a person can mend: told in words, without a traceback, with an exit code that is not 0."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Base of errors whose message names what is wrong, where, and the remedy."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with exit code 1 and the message alone when the block raises a UserError.

    Other exceptions keep their traceback: they are ours to mend.
    """
    try:
        yield
    except UserError as error:
        print(f"error (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
