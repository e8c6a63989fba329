"""Run a function on several processes of this machine, torch.distributed started, without torchrun.

For tools that need a layout of their own (conversion, verification). A fork server imports Megatron once, so that
starting a further set of processes takes a second and not ten. On a machine with GPUs each process has its own.
"""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_klear.errors import UserError

T = TypeVar("T")
_PRELOADED = (
    "megatron_klear.config.start",  # the first: its classes' docstrings are found by a search of all modules there are
    "megatron_klear.mcore.engine",
    "transformers.models.auto.configuration_auto",  # an engine reads config.json by these too, and imports them then
    "transformers.modeling_rope_utils",
)


class ProcessFailure(UserError, RuntimeError):
    """A process ended without a result; the message is its error's, the cause's traceback is on stderr."""


class Processes:
    """Running processes of one world; a context that leaves none behind."""

    def __init__(self, size: int, function: Callable[..., Any], *args: Any) -> None:
        """Start `function(*args)` on `size` processes. `function` is importable by name, arguments are pickled."""
        if torch.cuda.is_available() and torch.cuda.device_count() < size:
            raise ProcessFailure(
                f"{size} processes need {size} GPUs and {torch.cuda.device_count()} are visible; start the tool with "
                'CUDA_VISIBLE_DEVICES="" to run it on the CPU'
            )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_PRELOADED, __name__, function.__module__])
        self._folder = Path(tempfile.mkdtemp(prefix="klear-ranks-"))
        self._processes = [
            context.Process(target=_process, args=(rank, size, str(self._folder), function, args))
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> Processes:
        """The running processes."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self, rank: int | None = None) -> None:
        """Send SIGKILL to all, or to one, and wait until they are gone."""
        doomed = self._processes if rank is None else [self._processes[rank]]
        for process in doomed:
            if process.is_alive():
                process.kill()
        for process in doomed:
            process.join()

    def wait(self, timeout_seconds: float) -> bool:
        """Whether all have ended, well or not, within the time."""
        deadline = time.monotonic() + timeout_seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return not any(process.is_alive() for process in self._processes)

    def results(self, timeout_seconds: float | None = None) -> list[Any] | None:
        """What the function returned, by rank; None where the time ran out first. A process's error is raised here."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        running = {process.sentinel: process for process in self._processes}
        while running:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended = wait(list(running), timeout=remaining)
            if not ended:
                return None
            for sentinel in ended:
                process = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    raise _error(self._folder, process.exitcode)
        return [pickle.loads((self._folder / f"result-{rank}").read_bytes()) for rank in range(len(self._processes))]


def run_processes(size: int, function: Callable[..., T], *args: Any) -> list[T]:
    """What `function(*args)` returns on each of `size` processes, by rank; called right here when one is enough."""
    if size == 1:
        return [function(*args)]
    with Processes(size, function, *args) as processes:
        results = processes.results()
        assert results is not None
        return results


def _error(folder: Path, exit_code: int) -> BaseException:
    for path in sorted(folder.glob("error-*")):
        text, pickled = pickle.loads(path.read_bytes())
        print(text, file=sys.stderr)
        error: BaseException = pickle.loads(pickled) if pickled else ProcessFailure(text.strip().splitlines()[-1])
        return error
    return ProcessFailure(f"a process ended with exit code {exit_code} and no message")


def _process(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()  # Megatron collects garbage at every save; what was imported before the fork never is any
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )
        result = function(*args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            pickled = b""
        unfinished = Path(folder) / f".error-{rank}"
        unfinished.write_bytes(pickle.dumps((text, pickled)))
        unfinished.rename(Path(folder) / f"error-{rank}")
        os._exit(1)
