"""A run that ends by an error when a step is over: its checkpoint appears where its samples are on disk, only then."""

import errno
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from forked_orchestrator import spawning
from planted_errors import on_call
from tiny_rl_run import start, train, write_run

from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.runs.folder import checkpoints_of
from megatron_klear.runs.rollout_files import RolloutWriter, rollout_file

STEP = 2
WAIT_SECONDS = 60.0
NO_SPACE = "No space left on device"
KILLED = "was ended by signal 9"


def wait_for(there) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def plant(fault: str, folder: Path) -> None:
    """In the orchestrator: no file of one step, or a death once it is there or while it is not."""
    from megatron_klear.orchestrator.orchestrator import Orchestrator

    write, hand = RolloutWriter._write, RolloutWriter.write

    def never(self, step, rows):
        if step == STEP and fault == "full disk":
            raise OSError(errno.ENOSPC, NO_SPACE)
        if step == STEP and fault == "killed before":
            time.sleep(WAIT_SECONDS)
        write(self, step, rows)

    def noted(self, step, *arguments):
        if step == STEP + 1:
            (folder / "handed").touch()
        hand(self, step, *arguments)

    def killed(self, number):
        if fault == "killed after":
            self.flush(number)
        os.kill(os.getpid(), signal.SIGKILL)

    RolloutWriter._write, RolloutWriter.write = never, noted
    if fault != "full disk":
        Orchestrator.next_step = on_call(STEP + 1, killed, Orchestrator.next_step)


def train_into(fault: str, toml: Path, folder: Path, processes: int, *flags: str) -> tuple[str, list[str]]:
    """What the run says as it ends, and the folders of its checkpoints."""
    from megatron_klear.train import rollouts

    run = start(toml, *flags, processes=processes)
    note = manifest.note_written

    def late(hidden, rank):  # the next step's samples are handed over before this step's checkpoint is written
        if fault == "full disk" and f"step-{STEP:08d}" in hidden.name:
            wait_for((folder / "handed").exists)
        note(hidden, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "spawn", spawning(partial(plant, fault, folder)))
        patch.setattr(manifest, "note_written", late)
        with pytest.raises(Exception, match=f"{NO_SPACE}|{KILLED}") as ended:
            train(run)
    return str(ended.value), sorted(path.name for path in checkpoints_of(run.config).iterdir())


@pytest.mark.parametrize(
    ("fault", "processes", "told", "steps"),
    [
        ("full disk", 1, NO_SPACE, 1),
        ("killed before", 1, KILLED, 1),
        ("killed after", 2, KILLED, 2),
    ],
)
def test_a_checkpoint_appears_only_with_its_samples(ranks, tmp_path, fault: str, processes: int, told: str, steps: int):
    flags = ["--train.keep_rollouts", "true", "--algorithm.drop_zero_advantage", "false", "--train.steps", "4"]
    before = rollout_file(tmp_path / "run" / "rollouts", STEP).with_suffix(".jsonl")
    before.parent.mkdir(parents=True)
    before.write_text("of a run before\n")
    toml = write_run(tmp_path)
    for said, folders in ranks(processes, partial(train_into, fault), toml, tmp_path, processes, *flags):
        assert told in said
        assert folders == [f"step-{step:08d}" for step in range(1, steps + 1)]
    assert (before.read_text() == "of a run before\n") == (steps < STEP)
