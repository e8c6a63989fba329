"""Grading on the nodes of a Ray: one actor a worker, each with a worker process of its own that it can kill.

Requests go as JSON and scores come as JSON; no object that code near a response could have made is unpickled here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from megatron_klear.types import Score, Verdict

from .base import RewardError, RewardSettings, check_sources
from .owner import OwnedPool
from .plain import PlainError
from .pool import MEMORY_BYTES, usable_cores
from .process import Task, import_paths
from .ray_actor import GradingActor
from .ray_node import START_SECONDS, Head, RayNode, check_ray
from .wire import RemoteJob, read_told, write_job, write_request
from .worker import READY, NoAnswerError, Refused, Request, WorkerJob

_AT_ONCE = 2  # responses an actor has: the next is there when one is graded
_MAX_TRIES = 3
_MAX_FAILED_STARTS = 3
_GRADER_SECONDS = 180.0  # for a grader to import its rewards on a busy machine
_KNOCK_SECONDS = 10.0
_NODE_SECONDS = START_SECONDS + 60.0  # for the other nodes of a run to join
_KILL_AFTER_SECONDS = 60.0  # an actor kills its worker in time by itself: past this the actor hangs, or its node
_LOOK_SECONDS = 1.0
_STOP_SECONDS = 5.0


class _Actor:
    """A grader on some node, seen from the run."""

    def __init__(self, handle: Any, node: str) -> None:
        self.handle, self.node = handle, node
        self.ready = False
        self.deadline = time.monotonic() + _GRADER_SECONDS
        self.tasks: dict[Task, float] = {}
        """What it is at, each with the time at which it must be graded."""

    @property
    def late(self) -> bool:
        """Whether it should have been ready, or have answered."""
        return (
            min(self.tasks.values(), default=time.monotonic() + 1 if self.ready else self.deadline) < time.monotonic()
        )


class RayGradingPool(OwnedPool):
    """Graders on the nodes of a Ray, with the verbs of `GradingPool`.

    `address` "" starts a Ray on this node that ends with the run; "auto" or host:port joins one, and leaves it as it
    was. `workers` are those of a node, 0 is one per core that Ray has there. A grader whose process or node dies is
    replaced, and what it was at is graded by another, three times at most; then the response is an `error`. Files that
    requests point to (`truth_store`), modules of [reward.functions] and this package must be on every node under the
    same paths.
    """

    def __init__(
        self,
        data_sources: Iterable[str],
        settings: RewardSettings | None = None,
        *,
        address: str = "",
        nodes: int = 1,
        timeout_seconds: float = 5.0,
        workers: int = 0,
        memory_bytes: int = MEMORY_BYTES,
        trials: Sequence[Request] = (),
        environment: Sequence[str] = (),
    ) -> None:
        """Start or join Ray and start the graders, all in the background; `wait_until_ready` tells what failed.

        `nodes` is how many must have joined before graders are shared out. Raises RewardError where a data source has
        no reward, Ray is not installed, or a trial cannot be told to another node.
        """
        super().__init__(settings or RewardSettings())
        check_ray()
        sources = tuple(sorted(set(data_sources)))
        check_sources(sources, self.settings.functions)
        job = WorkerJob(
            settings=self.settings,
            data_sources=sources,
            timeout_seconds=timeout_seconds,
            memory_bytes=memory_bytes,
            trials=tuple(trials),
        )
        variables = {name: os.environ[name] for name in environment if name in os.environ}
        told = RemoteJob(
            job=job,
            environment=tuple(environment),
            variables=variables,
            paths=tuple(import_paths()[:-1]),
            folder=os.getcwd(),
        )
        try:
            self._job = write_job(told)
        except PlainError as error:
            raise RewardError(f"a ground truth cannot be told to another node: {error}") from None
        self._address, self._nodes, self._per_node = address, nodes, workers
        self._timeout_seconds = timeout_seconds
        self.restarts = 0
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._actors: list[_Actor] = []
        self._tries: Counter[Task] = Counter()
        self._failed_starts = 0
        self._was_ready = False
        self._node: RayNode | None = None
        self._ray: Any = None
        self._owner.start()

    @property
    def address(self) -> str:
        """Of the Ray, host:port, once `wait_until_ready` has returned; what other nodes join."""
        return self._node.address if self._node is not None else self._address

    def head(self) -> Head | None:
        """What other nodes join, of a Ray that the pool starts for more than one; see OwnedPool."""
        if self._address or self._nodes == 1:
            return None
        with self._changed:
            self._changed.wait_for(lambda: self._node is not None or self._over is not None)
            if self._over is not None:
                raise self._over
        return Head(self.address, os.environ["RAY_AUTH_TOKEN"])

    def _turn(self) -> None:
        """Hand out what waits, then wait for the next answer, deadline or death, and deal with it."""
        if self._ray is None:
            self._connect()
        self._hand_out()
        with contextlib.suppress(queue.Empty):
            self._events.get(timeout=_LOOK_SECONDS)()
            while True:  # what else has come, before anything is handed out
                self._events.get_nowait()()
        if self._node is not None:
            self._node.check()
        for actor in [actor for actor in self._actors if actor.late]:
            self._lost(actor, "it did not answer in time")
        ready = bool(self._actors) and all(actor.ready for actor in self._actors)
        self._was_ready |= ready
        self._tell_ready(ready)

    def _wake(self) -> None:
        self._events.put(lambda: None)

    def _end(self) -> None:
        if self._ray is not None:
            with contextlib.suppress(Exception):  # of a Ray that is gone
                stopped = [actor.handle.stop.remote() for actor in self._actors if self._node is None]
                self._ray.wait(stopped, num_returns=len(stopped), timeout=_STOP_SECONDS) if stopped else None
            self._ray.shutdown()
        if self._node is not None:
            self._node.close()

    def _connect(self) -> None:
        """Start or join Ray, and ask for a grader on every core of every node.

        In the owner's thread: in the main one Ray would take over SIGTERM.
        """
        if not self._address:
            own = RayNode.start(self._per_node or usable_cores(), wanted=lambda: not self._closing)
            with self._changed:
                self._node = own
                self._changed.notify_all()
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        if ray.is_initialized():
            raise RewardError("this process is connected to a Ray already, and can be to one only; close that first")
        try:
            _knock(self.address)
            ray.init(address=self.address, log_to_driver=False, configure_logging=False, namespace="klear-grading")
        except (OSError, RuntimeError, ValueError) as error:
            raise RewardError(
                f"no Ray answers at reward.ray_address {self.address!r} ({error}); is it up, and of this version, "
                f'{ray.__version__}? "" lets the run start its own'
            ) from error
        self._ray = ray
        for node, cores in sorted(self._alive_nodes().items()):
            for _ in range(self._per_node or int(cores)):
                self._start(node)
        if not self._actors:
            raise RewardError(
                f"the Ray at {self.address} has no CPU for grading; set reward.workers, the graders of a node"
            )

    def _alive_nodes(self) -> dict[str, float]:
        """Cores by node, once as many have joined as belong to the run."""
        deadline = time.monotonic() + _NODE_SECONDS
        while True:
            alive = {n["NodeID"]: n["Resources"].get("CPU", 0.0) for n in self._ray.nodes() if n["Alive"]}
            if len(alive) >= self._nodes or self._closing:
                return alive
            if time.monotonic() > deadline:
                raise RewardError(f"{len(alive)} of {self._nodes} nodes have joined the Ray at {self.address}")
            time.sleep(_LOOK_SECONDS)

    def _start(self, node: str) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        near = NodeAffinitySchedulingStrategy(node, soft=True)  # elsewhere where the node is gone
        # One call more than responses at once, so that `stop` is heard while it is at them.
        options = {"num_cpus": 1, "max_restarts": 0, "max_concurrency": _AT_ONCE + 1, "scheduling_strategy": near}
        cls = self._ray.remote(**options)(GradingActor)
        actor = _Actor(cls.remote(), node)
        self._actors.append(actor)
        self._ask(actor, actor.handle.start.remote(self._job), lambda content: self._started(actor, content))

    def _ask(self, actor: _Actor, reference: Any, take: Callable[[object], None]) -> None:
        """Have `take` called by the owner's thread with what is answered, or the actor replaced where nothing is."""

        def answered(future: Future[object]) -> None:
            self._events.put(lambda: self._heard(actor, future, take))

        reference.future().add_done_callback(answered)

    def _heard(self, actor: _Actor, future: Future[object], take: Callable[[object], None]) -> None:
        if actor not in self._actors:
            return  # replaced meanwhile; what it was at is another's
        try:
            content = future.result()
        except Exception as error:
            self._lost(actor, f"{type(error).__name__}: {error}".partition("\n")[0][:200])
            return
        try:
            take(content)
        except NoAnswerError as error:
            self._lost(actor, str(error))

    def _started(self, actor: _Actor, content: object) -> None:
        told = read_told(content)
        if told != READY:
            raise RewardError(told.words if isinstance(told, Refused) else str(told))
        actor.ready, self._failed_starts = True, 0

    def _hand_out(self) -> None:
        """To the graders with the least to do; a second response only once all have one."""
        for had in range(_AT_ONCE):
            for actor in self._actors:
                if not self._waiting:
                    return
                if actor.ready and len(actor.tasks) == had and (task := self._next()) is not None:
                    self._begin(actor, task)

    def _begin(self, actor: _Actor, task: Task) -> None:
        try:
            content = write_request(task.request)
        except PlainError as error:
            self._fail(task, error)
            return
        actor.tasks[task] = time.monotonic() + _AT_ONCE * self._timeout_seconds + _KILL_AFTER_SECONDS
        self._ask(actor, actor.handle.grade.remote(content), lambda content: self._take(actor, task, content))

    def _take(self, actor: _Actor, task: Task, content: object) -> None:
        told = read_told(content)
        if not isinstance(told, Score):
            raise NoAnswerError(f"no score of a grader: {told}")
        del actor.tasks[task]
        self._tries.pop(task, None)
        self._finish(task, told)

    def _lost(self, actor: _Actor, words: str) -> None:
        """Replace a grader that is gone or hangs; others grade what it was at."""
        self._actors.remove(actor)
        with contextlib.suppress(Exception):
            self._ray.kill(actor.handle)
        if not actor.ready:
            self._check_starts(words)
        self.restarts += 1
        self._start(actor.node)
        for task in reversed(actor.tasks):
            self._tries[task] += 1
            if self._tries[task] < _MAX_TRIES:
                self._again(task)
            else:
                note = f"its grader was lost {self._tries.pop(task)} times; the last: {words}"
                self._finish(task, self.failure(task.request, Verdict.ERROR, note))

    def _check_starts(self, words: str) -> None:
        """Raise RewardError where graders do not start; a run goes on with those that it has left after a node died."""
        self._failed_starts += 1
        left = self._was_ready and any(actor.ready for actor in self._actors)
        if left or self._failed_starts < _MAX_FAILED_STARTS:
            return
        has, free = self._ray.cluster_resources(), self._ray.available_resources()
        raise RewardError(
            f"graders do not start on the Ray at {self.address}, {self._failed_starts} times in a row; the last: "
            f"{words}. Of its {has.get('CPU', 0):g} CPUs {free.get('CPU', 0):g} are free, and every grader takes one: "
            "set reward.workers, the graders of a node. This package must be installed on every node"
        )

    def _again(self, task: Task) -> None:
        with self._changed:
            self._waiting.appendleft(task)


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at host:port: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError("it has not the form host:port")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS):
        pass
