"""Runs the commands of an ablation; what is done is not done again, whenever it was stopped."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from megatron_klear.config.files import write_text_atomically

from .plan import AblationError, ArmRun, Preparation

_log = logging.getLogger(__name__)
_TOLD_LINES = 15
_GRACE_SECONDS = 120
"""For a stage that is told to end, to save what it has."""
_SUPERVISOR = Path(__file__).resolve().parents[1] / "rollout" / "servers" / "supervisor.py"


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a folder that one `klear ablate` at a time may work in. Raises AblationError where another does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AblationError(
                f"another klear ablate works in {folder}; wait for it, or choose other --runs"
            ) from None
        yield


def prepare(wanted: Sequence[Preparation]) -> None:
    """Make what is missing, one after another.

    Raises AblationError where a command fails, or what is there was made by another one. What nobody here made is
    taken as it is.
    """
    for one in wanted:
        mark = one.creates.with_name(f".{one.creates.name}.command.json")
        if one.creates.exists():
            before = _marked(mark, one.creates) if mark.exists() else list(one.arguments)
            if before != list(one.arguments):
                raise AblationError(
                    f"{one.creates} was made by `{shlex.join(before)}`, and is wanted by "
                    f"`{shlex.join(one.arguments)}`; "
                    "choose other --runs, or remove it and the runs that read it"
                )
            continue
        one.creates.parent.mkdir(parents=True, exist_ok=True)
        _log.info("prepare %s", one.creates)
        write_text_atomically(mark, json.dumps(one.arguments) + "\n")
        _Commands().run(one.arguments, one.creates.with_name(f"{one.creates.name}.log"))
        if not one.creates.exists():
            raise AblationError(f"klear {' '.join(one.arguments)} did not make {one.creates}")


def run_all(planned: Sequence[ArmRun], jobs: int) -> None:
    """Run everything, `jobs` at a time.

    Raises AblationError where a stage fails; the others under way end first. Interrupted, those are told to end.
    """
    start, commands = time.monotonic(), _Commands()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_run, one, commands): one for one in planned}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                one, seconds = futures[future], future.result()
                _log.info(
                    "%d of %d: %s, seed %d, %s; %.0f s in all",
                    *(done, len(planned), one.arm, one.seed),
                    "was there" if seconds is None else f"{seconds:.0f} s",
                    time.monotonic() - start,
                )
        except BaseException as error:
            for future in futures:
                future.cancel()
            if not isinstance(error, AblationError):
                commands.stop()
            raise


def _run(one: ArmRun, commands: _Commands) -> float | None:
    """All stages of one run; its seconds, None where everything was done before."""
    start, ran = time.monotonic(), False
    for index, arguments in enumerate(one.stages):
        mark = one.folder / f"stage-{index}.json"
        if mark.exists():
            before = _marked(mark, one.folder)
            if before != list(arguments):
                raise AblationError(
                    f"{one.folder} was made with other settings: stage {index} was `{' '.join(before)}` and is "
                    f"`{' '.join(arguments)}`; remove the folder, or choose other --runs"
                )
            continue
        one.folder.mkdir(parents=True, exist_ok=True)
        commands.run(arguments, one.folder / f"stage-{index}.log")
        write_text_atomically(mark, json.dumps(list(arguments)) + "\n")
        ran = True
    return time.monotonic() - start if ran else None


def _marked(mark: Path, made: Path) -> list[str]:
    """The command that `mark` says `made` was made by."""
    try:
        words = json.loads(mark.read_text())
        if isinstance(words, list):
            return [str(word) for word in words]
    except ValueError:
        pass
    raise AblationError(f"{mark} does not say what {made} was made by; remove both, and it is made again")


class _Commands:
    """Commands of `klear` under way; none of them outlives this process, however it ends."""

    def __init__(self) -> None:
        self._lock, self._stopping = threading.Lock(), False
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, arguments: Sequence[str], log: Path) -> None:
        """Run one to its end. Raises AblationError where it fails."""
        command = [sys.executable, "-m", "megatron_klear.cli", *arguments]
        supervised = [sys.executable, str(_SUPERVISOR), str(os.getpid()), str(_GRACE_SECONDS), *command]
        # Runs share the machine: tiny models gain nothing by threads.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with log.open("w") as stream:
            with self._lock:
                if self._stopping:
                    raise AblationError("interrupted")
                # A session of its own: ctrl-C reaches a stage once, from here.
                process = subprocess.Popen(
                    supervised, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self._running.add(process)
            try:
                code = process.wait()
            except BaseException:
                self.stop()
                process.wait()
                raise
            finally:
                self._running.discard(process)
        if code:
            told = "\n".join(log.read_text(errors="replace").splitlines()[-_TOLD_LINES:])
            raise AblationError(f"klear {' '.join(arguments)} ended with {code} ({log}):\n{told}")

    def stop(self) -> None:
        """Tell those under way to end, and begin no other."""
        with self._lock:
            self._stopping = True
            for process in tuple(self._running):
                process.terminate()
