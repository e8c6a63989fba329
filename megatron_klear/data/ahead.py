"""The next step's rows, read and packed by a thread while the present step trains."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from megatron_klear.data.sft import SampleStream
from megatron_klear.types import PackedBatch

_Made = tuple[list[PackedBatch], dict[str, Any]]
"""A step's rows, and the stream's position once it has been taken."""


class StepsAhead:
    """A stream's steps, one of them made ahead; a context, which ends the thread.

    The position it tells is that of the steps that were given: what was made ahead is made again on resume.
    """

    def __init__(self, stream: SampleStream) -> None:
        """Steps of `stream`, from where it stands; it is this object's alone from now on."""
        self._stream, self._state = stream, stream.state_dict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._next: Future[_Made] | None = None

    def next_step(self, *, last: bool = False) -> list[PackedBatch]:
        """This rank's micro-batches of the next step; nothing is made ahead of the `last`.

        What went wrong in the thread (DataError) is raised by the call that would have given that step.
        """
        batches, self._state = (self._next or self._thread.submit(self._make)).result()
        self._next = None if last else self._thread.submit(self._make)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The position after the step given last. Returns when the thread rests, for a checkpoint forks its writers."""
        if self._next is not None:
            self._next.exception()
        return self._state

    def __enter__(self) -> StepsAhead:
        """The steps."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self) -> _Made:
        return self._stream.next_step(), self._stream.state_dict()
