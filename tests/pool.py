"""Run a function on several ranks over gloo, in milliseconds instead of the seconds that starting Megatron costs.

A fork server imports torch and Megatron once; every case runs in fresh processes forked from it, so that a case sees no
state of an earlier one and may crash or hang without harm. Nothing outlives the test session: the server leaves when
its connection closes, even when pytest is killed, and takes the ranks' process groups with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

MAX_RANKS = 8
PRELOADED = (
    "megatron_klear.config.start",  # the first: its classes' docstrings are found by a search of all modules there are
    "megatron_klear.mcore.engine",
    "megatron_klear.train.sft",
    "megatron_klear.train.rl_run",
    # What an engine imports when it is made, a second of every rank's: how transformers reads config.json.
    "transformers.modeling_rope_utils",
    "transformers.models.llama.configuration_llama",
    "transformers.models.qwen2.configuration_qwen2",
    "transformers.models.qwen3.configuration_qwen3",
    "transformers.models.qwen3_moe.configuration_qwen3_moe",
)
_GRACE_SECONDS = 3.0  # for the other ranks to end after the first one failed
_PR_SET_PDEATHSIG = 1
_STARTED = "pool/started"  # key of the store: ranks that have met the others
_DONE = "pool/done"  # likewise: ranks that no longer need it


class RankFailure(RuntimeError):
    """A rank ended without a result, hung, or raised what cannot be sent across processes."""


@dataclass(frozen=True)
class _Case:
    """What the server needs to run a case; the function and its arguments stay pickled for the ranks."""

    world_size: int
    module: str
    search_path: list[str]
    folder: Path
    timeout_seconds: float

    def result(self, rank: int) -> Path:
        """Where a rank leaves what it returned or raised."""
        return self.folder / f"result.{rank}"


@dataclass(frozen=True)
class _Raised:
    """An exception as one rank raised it."""

    time: float
    error: BaseException
    text: str


class Pool:
    """Runs functions on gloo ranks; `close` ends the fork server, which the next call starts again."""

    def __init__(self, first: str = "", **environment: str) -> None:
        """`first` is a module that the fork server imports before Megatron, with these variables of its environment."""
        self._first = first
        self._environment = environment
        self._server: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __call__(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0
    ) -> list[Any]:
        """Call `function(*args)` on `world_size` ranks with torch.distributed initialised; results in rank order.

        `function` must be importable by name, results picklable. Raises the exception of the rank that failed first,
        with the traceback and last output of every failed rank as notes, and RankFailure where a rank died or hung.
        """
        __tracebackhide__ = True  # pytest shows the test's own line, not these
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size {world_size}: the pool runs 1 to {MAX_RANKS} ranks")
        with tempfile.TemporaryDirectory(prefix="ranks-") as name:
            folder = Path(name)
            (folder / "call").write_bytes(pickle.dumps((function, args)))
            case = _Case(world_size, function.__module__, list(sys.path), folder, timeout_seconds)
            try:
                connection = self._connect()
                connection.send(case)
                endings: list[str] | BaseException = connection.recv()
            except EOFError:
                self.close()
                raise RankFailure("the fork server of the rank pool ended; its message is on stderr") from None
            except BaseException:  # an interrupt or a test's timeout: the reply would meet the next call
                self.close()
                raise
            if isinstance(endings, BaseException):
                raise endings
            return _results(case, endings)

    def close(self) -> None:
        """End the server and every rank it runs."""
        if self._connection is not None:
            self._connection.close()
        if self._server is not None:
            try:
                self._server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._connection = self._server = None

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection, theirs = Pipe()
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "TORCHDYNAMO_DISABLE": "1",  # compiling costs more than the tiny cases gain
                "CUDA_VISIBLE_DEVICES": "",
                **self._environment,
            }
            command = [sys.executable, __file__, str(theirs.fileno()), str(os.getpid()), self._first]
            self._server = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL
            )
            theirs.close()
        return self._connection


def _results(case: _Case, endings: Sequence[str]) -> list[Any]:
    """Results in rank order, or the first rank's exception with a note a failed rank."""
    __tracebackhide__ = True
    results: list[Any] = []
    raised: list[_Raised] = []
    notes: list[str] = []
    for rank, ending in enumerate(endings):
        path = case.result(rank)
        result = pickle.loads(path.read_bytes()) if path.exists() else None
        results.append(result)
        if not ending and not isinstance(result, _Raised):
            continue
        told = (case.folder / f"output.{rank}").read_text(errors="replace")[-4000:]
        note = f"--- rank {rank} {ending or 'raised'}\n"
        if isinstance(result, _Raised):
            raised.append(result)
            note += result.text
        notes.append(note + (f"\n--- output of rank {rank}\n{told}" if told else ""))
    if not notes:
        return results
    if raised:
        error = min(raised, key=lambda one: one.time).error
    else:
        error = RankFailure("; ".join(f"rank {rank} {ending}" for rank, ending in enumerate(endings) if ending))
    for note in notes:
        error.add_note(note)
    raise error


def _serve(connection: Connection, parent: int, first: str) -> None:
    """The server's loop: import what cases need, fork their ranks, report how each one ended."""
    while True:
        try:
            case: _Case = connection.recv()
        except EOFError:
            return
        sys.path[:] = case.search_path
        try:
            _preload(first)
            importlib.import_module(case.module)
        except Exception as error:
            connection.send(_portable(error))
            continue
        endings = _run(case, connection, parent)
        if endings is None:
            return
        connection.send(endings)


def _preload(first: str) -> None:
    """Import what every case needs; on all calls but the first there is nothing left to do."""
    import torch

    torch.set_num_threads(1)
    if first:
        importlib.import_module(first)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # ranks neither search what they were forked with nor, by that, copy its pages


def _run(case: _Case, connection: Connection, parent: int) -> list[str] | None:
    """Fork the ranks and wait: '' or what went wrong for each rank; None when the session has ended meanwhile."""
    listener = socket.create_server(("127.0.0.1", 0))
    ranks = {}
    for rank in range(case.world_size):
        server, child = os.getpid(), os.fork()
        if child == 0:
            connection.close()
            _rank(case, rank, listener, server)
        ranks[child] = rank
    listener.close()
    endings = [""] * case.world_size
    deadline, overdue = time.monotonic() + case.timeout_seconds, f"hung for {case.timeout_seconds:g} seconds"
    try:
        while ranks:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child in ranks:
                rank = ranks.pop(child)
                _kill_group(child)  # whatever the rank started and left behind
                if status == 0:
                    continue
                if not case.result(rank).exists():
                    code = os.waitstatus_to_exitcode(status)
                    endings[rank] = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
                if time.monotonic() + _GRACE_SECONDS < deadline:
                    deadline, overdue = time.monotonic() + _GRACE_SECONDS, f"was still waiting when rank {rank} failed"
            elif time.monotonic() > deadline:
                for rank in ranks.values():
                    endings[rank] = "" if case.result(rank).exists() else overdue
                _dump_stacks(list(ranks))
                return endings
            elif connection.poll(0.002) or os.getppid() != parent:
                return None
        return endings
    finally:
        for child in ranks:
            _kill_group(child)
            os.waitpid(child, 0)


def _dump_stacks(children: Sequence[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGUSR1)
    time.sleep(0.3)


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # a child that has not made its group yet
        os.kill(child, signal.SIGKILL)


def _rank(case: _Case, rank: int, listener: socket.socket, server: int) -> NoReturn:
    """The life of one rank, from fork to exit; it never returns into the server's loop."""
    status = 1
    try:
        os.setpgid(0, 0)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        output = os.open(case.folder / f"output.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.enable(file=2)
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        status = _call(case, rank, listener)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _call(case: _Case, rank: int, listener: socket.socket) -> int:
    """Initialise torch.distributed, call the function, leave its result in a file; the exit status."""
    import torch.distributed as dist

    store = _store(case, rank, listener)
    partial = case.folder / f"partial.{rank}"
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.world_size)
        store.add(_STARTED, 1)
        while rank == 0 and store.add(_STARTED, 0) < case.world_size:  # it hosts the store, and may fail at once
            time.sleep(0.001)
        function, args = pickle.loads((case.folder / "call").read_bytes())
        partial.write_bytes(pickle.dumps(function(*args)))
    except BaseException as error:
        text = traceback.format_exc()
        partial.write_bytes(pickle.dumps(_Raised(time.monotonic(), _portable(error), text)))
        partial.rename(case.result(rank))
        with contextlib.suppress(Exception):
            store.add(_DONE, 1)
        return 1
    partial.rename(case.result(rank))
    with contextlib.suppress(Exception):  # a rank that failed has told its own story
        _leave(store, case.world_size)
    return 0


def _store(case: _Case, rank: int, listener: socket.socket) -> Any:
    """The ranks' rendezvous, on a port bound before the fork so that no other program can take it."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(case.world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(case.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=case.timeout_seconds + 30)
    if rank == 0:
        return TCPStore("127.0.0.1", port, case.world_size, True, timeout, False, master_listen_fd=listener.detach())
    listener.close()
    return TCPStore("127.0.0.1", port, case.world_size, False, timeout, False)


def _leave(store: Any, world_size: int) -> None:
    """Destroy the groups once every rank is done: rank 0 hosts the store that others may still ask."""
    import torch.distributed as dist

    store.add(_DONE, 1)
    while store.add(_DONE, 0) < world_size:
        time.sleep(0.001)
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _portable(error: BaseException) -> BaseException:
    """The exception itself where it survives a pickle, its text as a RankFailure where it does not."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankFailure(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    # Cases refer to this module by its importable name; here it runs as __main__.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    importlib.import_module("pool")._serve(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # taking torch and Megatron apart would cost seconds
