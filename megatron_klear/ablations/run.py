"""Runs the commands of an ablation; what is done is not done again, whenever it was stopped."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_klear.config.files import write_text_atomically

from .plan import AblationError, ArmRun, Preparation

_log = logging.getLogger(__name__)
_TOLD_LINES = 15


def prepare(wanted: Sequence[Preparation]) -> None:
    """Make what is missing, one after another. Raises AblationError where a command fails."""
    for one in wanted:
        if one.creates.exists():
            continue
        one.creates.parent.mkdir(parents=True, exist_ok=True)
        _log.info("prepare %s", one.creates)
        _klear(one.arguments, one.creates.with_name(f"{one.creates.name}.log"))
        if not one.creates.exists():
            raise AblationError(f"klear {' '.join(one.arguments)} did not make {one.creates}")


def run_all(planned: Sequence[ArmRun], jobs: int) -> None:
    """Run everything, `jobs` at a time. Raises AblationError where a stage fails; the others under way end first."""
    start, done = time.monotonic(), 0
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_run, one) for one in planned]
        try:
            for one, future in zip(planned, futures, strict=True):
                seconds = future.result()
                done += 1
                _log.info(
                    "%d of %d: %s, seed %d, %s; %.0f s in all",
                    *(done, len(planned), one.arm, one.seed),
                    "was there" if seconds is None else f"{seconds:.0f} s",
                    time.monotonic() - start,
                )
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _run(one: ArmRun) -> float | None:
    """All stages of one run; its seconds, None where everything was done before."""
    start, ran = time.monotonic(), False
    for index, arguments in enumerate(one.stages):
        mark = one.folder / f"stage-{index}.json"
        if mark.exists():
            before = json.loads(mark.read_text())
            if before != list(arguments):
                raise AblationError(
                    f"{one.folder} was made with other settings: stage {index} was `{' '.join(before)}` and is "
                    f"`{' '.join(arguments)}`; remove the folder, or choose other --runs"
                )
            continue
        one.folder.mkdir(parents=True, exist_ok=True)
        _klear(arguments, one.folder / f"stage-{index}.log")
        write_text_atomically(mark, json.dumps(list(arguments)) + "\n")
        ran = True
    return time.monotonic() - start if ran else None


def _klear(arguments: Sequence[str], log: Path) -> None:
    command = [sys.executable, "-m", "megatron_klear.cli", *arguments]
    # Runs share the machine: tiny models gain nothing by threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("w") as stream:
        ended = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        told = "\n".join(log.read_text(errors="replace").splitlines()[-_TOLD_LINES:])
        raise AblationError(f"klear {' '.join(arguments)} ended with {ended.returncode} ({log}):\n{told}")
