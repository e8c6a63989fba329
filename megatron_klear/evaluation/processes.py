"""An evaluation over the processes of torchrun: each holds a copy of the model and draws a share of the responses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from megatron_klear.distributed import exchange

from .sampling import LocalSource

_PATIENCE = timedelta(days=7)
"""The first process may grade for long while the others wait to draw."""


@contextmanager
def joined() -> Iterator[None]:
    """One group of all processes that torchrun started; nothing where there is one.

    Left by an error, the group is not destroyed: the others wait in it, and torchrun ends them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    # Its default arguments keep the group that there is when it is first imported: the group's threads would outlive
    # destroy_process_group, and one that meets the interpreter's end aborts the process.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("gloo", timeout=_PATIENCE)
    yield
    dist.destroy_process_group()


def on_all(first: Callable[[Callable[[], LocalSource]], None], open_source: Callable[[], LocalSource]) -> None:
    """Run `first`, given what opens the source, on the first process; the others draw what that one asks for."""
    if exchange.is_first():
        first(open_source)
        exchange.tell_all(None)  # no more is drawn
    else:
        open_source().draw_for_the_first()
