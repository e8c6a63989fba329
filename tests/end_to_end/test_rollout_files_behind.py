"""Rollout files are written behind the training: no step waits for them, and no checkpoint comes before them."""

import time
from functools import partial
from pathlib import Path

import pytest
from forked_orchestrator import spawning
from tiny_rl_run import start, train, write_run

from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.runs.folder import checkpoints_of
from megatron_klear.runs.rollout_files import RolloutWriter, rollout_file

HELD = 2  # the step whose file is written late
WAIT_SECONDS = 60.0


def write_late(folder: Path) -> None:
    """In the orchestrator: write the file of one step once the next one is trained."""
    write = RolloutWriter._write

    def late(self, step, rows):
        deadline = time.monotonic() + WAIT_SECONDS
        while step == HELD and not (folder / "trained").exists():
            if time.monotonic() > deadline:
                raise OSError("the step after it was not trained")
            time.sleep(0.01)
        write(self, step, rows)

    RolloutWriter._write = late


def train_noting(toml: Path, folder: Path, processes: int, *flags: str) -> list[tuple[int, bool]]:
    """Train; on rank 0 the checkpoints in the order they appeared, and whether their step's samples were on disk."""
    from megatron_klear.mcore.engine import Engine
    from megatron_klear.train import rollouts

    run = start(toml, *flags, processes=processes)
    published: list[tuple[int, bool]] = []
    publish, train_step = manifest.publish, Engine.train_step

    def noting(hidden, path, *rest):
        step = int(path.name.removeprefix("step-"))
        published.append((step, rollout_file(run.config.output / "rollouts", step).is_file()))
        publish(hidden, path, *rest)

    def trained(self, *arguments, **named):
        stats = train_step(self, *arguments, **named)
        if self.step == (HELD + 1) * 2 and self.topology.rank == 0:  # two updates each
            assert manifest.steps(checkpoints_of(run.config)) == [HELD - 1]
            assert not rollout_file(run.config.output / "rollouts", HELD).exists()
            (folder / "trained").touch()
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "spawn", spawning(partial(write_late, folder)))
        patch.setattr(manifest, "publish", noting)
        patch.setattr(Engine, "train_step", trained)
        train(run)
    return published


@pytest.mark.parametrize("processes", [1, 2])
def test_training_goes_on_while_samples_are_written_and_checkpoints_come_after_them(ranks, tmp_path, processes: int):
    flags = ["--train.keep_rollouts", "true", "--algorithm.drop_zero_advantage", "false", "--train.steps", "4"]
    published = ranks(processes, train_noting, write_run(tmp_path), tmp_path, processes, *flags)[0]
    assert published == [(step, True) for step in (1, 2, 3, 4)]
