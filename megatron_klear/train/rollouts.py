"""The orchestrator as the training ranks see it: collective verbs. Rank 0 alone talks to its process.

A call of the orchestrator may come back with a wish before it comes back with a result: weights for a server, samples
from the trainer's own sampler. All ranks grant it together, as they wait together for the result.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_klear.config.start import GPPOStart
from megatron_klear.distributed import exchange
from megatron_klear.errors import UserError
from megatron_klear.orchestrator.link import LinkClosedError
from megatron_klear.orchestrator.process import Spawned, spawn
from megatron_klear.orchestrator.step_numbers import StepNumbers, TokenArrays
from megatron_klear.orchestrator.trainer import Drawer, Sender
from megatron_klear.rollout.vllm.open import Access
from megatron_klear.runs.rollout_files import rollout_file
from megatron_klear.train.grading_nodes import GradingNodes, nodes_of_job
from megatron_klear.types import Sample

HEARTBEAT_SECONDS = 10.0
"""Longest time that ranks wait for news from rank 0: far below the limit of a collective."""
_END_SECONDS = 60.0  # servers have their grace
_NOTICE_SECONDS = 5.0
_DEAD_SECONDS = 5.0
_GIVE_UP_SECONDS = 3.0  # less than the other ranks wait for all to come to one error, see runs.folder
_File = tuple[str, int, int]  # name, inode, nanoseconds at which it was written


class OrchestratorLost(UserError):
    """The orchestrator's process ended before the run did."""


class Rollouts:
    """A context, which ends the orchestrator. Every method is collective."""

    def __init__(self, start: GPPOStart, tell: Callable[[str], None] = lambda _: None) -> None:
        """Start the process on rank 0; `tell` takes news for people, until `tell` is set to something better."""
        self.tell = tell
        self.trainer: Drawer | Sender | None = None
        """Who grants the orchestrator's wishes; to be set before `open`."""
        self._config, self._grading_nodes = start.config, GradingNodes()
        self._spawned: Spawned | None = None
        self._value: Any = None
        self._under_way = ""
        self._loss: OrchestratorLost | None = None
        self._found: dict[int, set[_File]] = {}  # of a step that is being kept: what lay there, of a run before
        self._ending = threading.Event()
        self._noticed = threading.Event()
        if exchange.is_first():
            self._spawned = spawned = spawn()
            threading.Thread(target=self._watch, args=(spawned.process,), name="orchestrator", daemon=True).start()
            self._send(start)

    def __enter__(self) -> Rollouts:
        """The rollouts."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process, and with it servers, grading processes and writers."""
        self.close()

    def read_prompts(self) -> list[str]:
        """Wait until the prompts are read and fit; what is to be said of them, on rank 0.

        Raises UserError where they cannot be used, or the rewards, or the tokens.
        """
        return self._result() or []

    def open(self) -> Access | None:
        """Start grading processes and servers; how servers are reached, on rank 0 and where there are any."""
        self._grading_nodes.join(self._call("open_grading", nodes_of_job()), self._config.reward)
        access: Access | None = self._call("open")
        return access

    def sync(self, version: int) -> None:
        """Give the sampler the trainer's present weights, with proof; `version` is the number of steps trained."""
        self._call("sync", version)

    def next_step(self, number: int) -> tuple[StepNumbers, dict[str, float], dict[str, float]]:
        """The numbers of the samples that step `number` trains on, metrics of what was sampled, and seconds of phases.

        On every rank.
        """
        given = self._call("next_step", number)
        return exchange.from_first_rank(lambda: (given.numbers, dict(given.metrics), dict(given.seconds)))

    def arrays(self, parts: Sequence[Sequence[int]]) -> list[TokenArrays]:
        """Rank 0: the step's samples that each part names by their numbers; the others get none."""
        return self._call("arrays", parts) or []

    def keep(
        self,
        step: int,
        advantages: Sequence[npt.NDArray[np.float64]],
        ratios: Mapping[int, npt.NDArray[np.float32]],
    ) -> None:
        """Write the step's samples behind the training; rank 0's arguments count."""
        if exchange.is_first():
            self._found = {s: found for s, found in self._found.items() if s == step - 1}
            self._found[step] = _files_of(self._config.output / "rollouts", step)
        self._call("keep", step, advantages, ratios)

    def validate(self, step: int) -> dict[str, float] | None:
        """Rank 0: the validation's numbers with the weights of `step`, None without one."""
        found: dict[str, float] | None = self._call("validate", step)
        return found

    def sample(self, prompts: int) -> list[Sample]:
        """Samples of the next few prompts, on every rank."""
        samples = self._call("sample", prompts)
        return exchange.tell_all(samples)

    def sleep(self) -> None:
        """Give back memory that only sampling needs."""
        self._call("sleep")

    def flush(self, step: int) -> None:
        """Return when the samples of `step`, which are kept, and of those before it are on disk.

        Looks there itself where the orchestrator is lost or at something else: it may have written them before.
        """
        try:
            self._call("flush", step)
        except UserError:  # on every rank alike
            if not exchange.from_first_rank(lambda: self._was_written(step)):
                raise

    def state(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Rank 0: what a checkpoint holds of the rollouts, as JSON and as files; the others get nothing."""
        return self._call("state") or ({}, {})

    def load_state(self, state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Go on from a saved state; rank 0's counts."""
        self._call("load_state", state, files)

    def close(self) -> None:
        """End the process, if it still is there. May be called twice."""
        spawned, self._spawned = self._spawned, None
        self._ending.set()
        self._grading_nodes.close()
        if spawned is None:
            return
        with contextlib.suppress(LinkClosedError):
            spawned.link.send("close")
        spawned.link.close()
        if self._under_way:  # not by closing alone: forks of this process, as checkpoints have, hold both ends open
            with contextlib.suppress(OSError):
                spawned.lifeline.shutdown(socket.SHUT_RDWR)
        spawned.lifeline.close()
        try:
            spawned.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            spawned.process.kill()
            spawned.process.wait()

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the orchestrator's call returns, on rank 0; None elsewhere. Errors are raised on every rank."""
        exchange.on_first_rank(lambda: self._begin(name, arguments))
        return self._result()

    def _begin(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Rank 0: send a call, unless an error or a signal left another one before its answer, which would be met."""
        if self._loss is not None:
            raise self._loss
        if self._under_way:
            raise OrchestratorLost(f"the orchestrator was left in the middle of {self._under_way}")
        self._under_way = name
        try:
            self._send((name, arguments))
        except Exception:
            if self._loss is None:  # what cannot be pickled was not begun
                self._under_way = ""
            raise

    def _was_written(self, step: int) -> bool:
        found = self._found.get(step)
        return found is not None and bool(_files_of(self._config.output / "rollouts", step) - found)

    def _result(self) -> Any:
        while True:
            news = exchange.from_first_rank(self._next)
            if news is None:
                continue
            name, arguments = news
            if name == "done":
                value, self._value = self._value, None
                return value
            assert self.trainer is not None
            try:
                granted = getattr(self.trainer, name)(*arguments)
            except Exception as error:
                if exchange.is_first():
                    self._give_up(str(error))
                raise
            exchange.on_first_rank(partial(self._send, ("granted", granted)))

    def _give_up(self, why: str) -> None:
        """Rank 0: tell the orchestrator that its wish cannot be granted, and hear the end of the call."""
        assert self._spawned is not None
        with contextlib.suppress(LinkClosedError):  # the trainer's own error is the one to know
            self._spawned.link.send(("failed", why))
            while (message := self._spawned.link.receive(_GIVE_UP_SECONDS)) is not None:
                if message[0] in ("error", "result"):
                    self._under_way = ""
                    return

    def _next(self) -> tuple[str, tuple[Any, ...]] | None:
        """Rank 0: a wish, or that the call is done; None where there is no news for a while."""
        assert self._spawned is not None
        while True:
            try:
                message = self._spawned.link.receive(HEARTBEAT_SECONDS)
            except LinkClosedError:
                raise self._lost() from None
            if message is None:
                return None
            kind, *content = message
            if kind == "say":
                self.tell(content[0])
            elif kind == "error":
                self._under_way = ""
                raise content[0]
            elif kind == "ask":
                return content[0], content[1]
            else:
                self._under_way = ""
                self._value = content[0]
                return "done", ()

    def _send(self, message: Any) -> None:
        assert self._spawned is not None
        try:
            self._spawned.link.send(message)
        except LinkClosedError:
            raise self._lost() from None

    def _lost(self) -> OrchestratorLost:
        """How its process ended, which every later call says again: the first may be got over, see `flush`."""
        self._noticed.set()
        assert self._spawned is not None
        try:
            words = _end_of(self._spawned.process.wait(_DEAD_SECONDS))
        except subprocess.TimeoutExpired:
            words = "the orchestrator's process closed its link and goes on; see its messages above"
        self._loss = OrchestratorLost(words)
        return self._loss

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Rank 0: end the run where the orchestrator dies while nobody waits for it, as in the middle of a long step.

        Every file of a run is whole at every instant, so that nothing is lost by ending so.
        """
        code = process.wait()
        if self._ending.wait(_NOTICE_SECONDS) or self._noticed.is_set():
            return
        print(f"error (rank 0): {_end_of(code)}", file=sys.stderr, flush=True)
        exchange.tell_failed()
        os._exit(1)


def _files_of(folder: Path, step: int) -> set[_File]:
    """The step's rollout files, told from others of the same name."""
    found = set()
    for path in (rollout_file(folder, step).with_suffix(suffix) for suffix in (".jsonl", ".parquet")):
        with contextlib.suppress(OSError):
            of = path.stat()
            found.add((path.name, of.st_ino, of.st_mtime_ns))
    return found


def _end_of(code: int) -> str:
    how = f"ended with exit code {code}; its own words are above"
    if code < 0:
        how = f"was ended by signal {-code} ({signal.Signals(-code).name}); is the machine out of memory?"
    return f"the orchestrator's process {how}. Start the run again: it goes on from its newest checkpoint"
