"""train_gppo.py with an error planted in one of its processes: `torchrun tests/planted_errors.py FAULT ARGUMENTS...`.

The file `planted` of the run's folder gets the time at which the error happens.
"""

import errno
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FOLDER = Path(os.environ.get("PLANTED_FOLDER", "."))
RANK = int(os.environ.get("RANK", "0"))


def note() -> None:
    """Now it happens."""
    (FOLDER / "planted").write_text(repr(time.time()))


def failing(error: Exception):
    """A function that raises in place of another."""

    def fail(*_: object, **__: object) -> None:
        note()
        raise error

    return fail


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def on_call(count: int, instead, of):
    """`of`, but `instead` from the call number `count` on."""
    calls = []

    def call(*arguments, **named):
        calls.append(1)
        return (instead if len(calls) >= count else of)(*arguments, **named)

    return call


def killed(*_: object, **__: object) -> None:
    note()
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_orchestrator(fault: str) -> None:
    """Plant there."""
    from megatron_klear.orchestrator.orchestrator import Orchestrator
    from megatron_klear.runs.rollout_files import RolloutWriter

    match fault:
        case "orchestrator killed in a call":
            Orchestrator.next_step = on_call(2, killed, Orchestrator.next_step)
        case "rollout file":
            RolloutWriter._write = failing(full_disk())


def in_a_long_step(rollouts, engine) -> None:
    """Kill the orchestrator, whose own process it is, while the ranks train."""
    spawn, spawned = rollouts.spawn, []

    def spawning():
        spawned.append(spawn())
        return spawned[0]

    def step(*_: object, **__: object) -> None:
        if RANK == 0:
            note()
            spawned[0].process.kill()
        time.sleep(100)

    rollouts.spawn = spawning
    engine.train_step = on_call(3, step, engine.train_step)


def plant(fault: str) -> None:
    """Plant in this rank what belongs there."""
    from megatron_klear.mcore.engine import Engine
    from megatron_klear.runs.metrics_file import MetricsFile
    from megatron_klear.runs.trackers import WandbLog
    from megatron_klear.train import rollouts

    if fault in ("orchestrator killed in a call", "rollout file"):
        from forked_orchestrator import spawning

        rollouts.spawn = spawning(partial(in_the_orchestrator, fault))
    match fault, RANK:
        case "orchestrator killed while training", _:
            in_a_long_step(rollouts, Engine)
        case "rank killed", 1:
            Engine.train_step = on_call(2, killed, Engine.train_step)
        case "rank raises", 1:
            Engine.train_step = on_call(2, failing(RuntimeError("planted in a step")), Engine.train_step)
        case "first rank raises", 0:
            Engine.train_step = on_call(2, failing(RuntimeError("planted in a step")), Engine.train_step)
        case "checkpoint", 1:
            Engine.save = failing(full_disk())
        case "metrics file", 0:
            MetricsFile.write = failing(full_disk())
        case "wandb", 0:
            WandbLog.__init__ = failing(RuntimeError("wandb says no"))
        case "out of memory", 1:
            Engine.logprobs = failing(MemoryError("planted"))


if __name__ == "__main__":
    chosen = sys.argv.pop(1)
    plant(chosen)
    from megatron_klear.cli import main

    sys.exit(main(["gppo", *sys.argv[1:]]))
