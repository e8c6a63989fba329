"""SIGTERM and Ctrl-C end a run with a checkpoint and in one line; a second start in the folder of a run is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_rl_run
import tiny_run

from megatron_klear.errors import RunLeft
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.runs.leave import Leaving

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"sft": ("pretrain_sft.py", tiny_run), "gppo": ("train_gppo.py", tiny_rl_run)}
DEADLINE_SECONDS = 150.0


def launch(kind: str, toml: Path, ranks: int, *flags: str) -> subprocess.Popen[str]:
    """The entry script as a user starts it; its output is one stream."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*start, str(ROOT / SCRIPTS[kind][0]), "--config", str(toml), "--checkpoint.save_every", "0", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def after_steps(run: subprocess.Popen[str], steps: int) -> str:
    """What was printed until so many steps were reported."""
    assert run.stdout is not None
    told, deadline = "", time.monotonic() + DEADLINE_SECONDS
    while not any(line.startswith("step") and f" {steps}/" in line for line in told.splitlines()):
        line = run.stdout.readline()
        assert line, told
        assert time.monotonic() < deadline, told
        told += line
    return told


def losses(folder: Path) -> dict[int, float]:
    """The loss of every step that metrics.jsonl holds."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize(
    ("kind", "ranks", "sent"),
    [
        ("sft", 1, signal.SIGINT),
        ("sft", 2, signal.SIGTERM),
        ("gppo", 1, signal.SIGTERM),
        ("gppo", 2, signal.SIGTERM),
    ],
)
def test_a_signal_saves_and_leaves_in_one_line(kind: str, ranks: int, sent: signal.Signals, tmp_path: Path):
    toml = SCRIPTS[kind][1].write_run(tmp_path)
    with launch(kind, toml, ranks, "--train.steps", "100000") as run:
        after_steps(run, 2)
        with launch(kind, toml, 1, "--train.steps", "100000") as second:
            told, _ = second.communicate(timeout=DEADLINE_SECONDS)
            assert second.returncode == 2, told
            assert "a run is in output" in told
            assert "Traceback" not in told
        run.send_signal(sent)
        told, _ = run.communicate(timeout=DEADLINE_SECONDS)
    assert told.count("stopped after step") == 1, told
    if ranks == 1:  # torchrun has words and a code of its own
        assert run.returncode == 128 + sent
        assert "Traceback" not in told
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    before = losses(tmp_path)
    assert max(before) == stopped


def run_with(kind: str, toml: Path, output: Path, processes: int, event: str, *flags: str) -> None:
    """The run in this rank; in the third training step it meets a signal, or an error."""
    from megatron_klear.mcore.engine import Engine
    from megatron_klear.train import rl_run, sft

    step, calls = Engine.train_step, []

    def meets(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3 and event == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == 3 and event == "error":
            raise ZeroDivisionError("planted")
        return step(self, *args, **kwargs)

    Engine.train_step = meets
    run = SCRIPTS[kind][1].start(toml, "--output", str(output), *flags, processes=processes)
    (sft if kind == "sft" else rl_run).run(run)


@pytest.mark.parametrize("kind", ["sft", "gppo"])
def test_a_run_that_goes_on_after_a_signal_ends_with_the_same_bits(kind: str, tmp_path: Path, ranks):
    toml = SCRIPTS[kind][1].write_run(tmp_path)
    flags = ("--train.steps", "4", "--checkpoint.save_every", "0")
    ranks(1, run_with, kind, toml, tmp_path / "whole", 1, "", *flags)
    with pytest.raises(RunLeft, match="SIGTERM: stopped after step") as left:
        ranks(1, run_with, kind, toml, tmp_path / "stopped", 1, "signal", *flags)
    assert left.value.exit_code == 128 + signal.SIGTERM
    (stopped,) = manifest.steps(tmp_path / "stopped/checkpoints")
    assert stopped < 4
    ranks(1, run_with, kind, toml, tmp_path / "stopped", 1, "", *flags)
    last = [manifest.step_folder(tmp_path / name / "checkpoints", 4) for name in ("whole", "stopped")]
    assert not compare_checkpoints(*last).unequal_tensors


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_publishes_the_checkpoint_that_is_being_written(processes: int, tmp_path: Path, ranks):
    toml = tiny_run.write_run(tmp_path)
    with pytest.raises(ZeroDivisionError) as error:
        ranks(processes, run_with, "sft", toml, tmp_path / "run", processes, "error", "--checkpoint.save_every", "2")
    assert "error (rank 0):" in "".join(error.value.__notes__)
    checkpoints = tmp_path / "run/checkpoints"
    assert manifest.steps(checkpoints) == [2]
    assert not manifest.damage(manifest.step_folder(checkpoints, 2))
    assert len(list(checkpoints.iterdir())) == 1, "nothing half written is left"


def noting_what_is_published(kind: str, toml: Path, output: Path) -> None:
    """The run in this rank, which meets an error and notes the checkpoints that there are when its log is closed."""
    from megatron_klear.runs.log import RunLog

    close = RunLog.close

    def noted(log: RunLog) -> None:
        (output / "published").write_text(json.dumps(manifest.steps(output / "checkpoints")))
        close(log)

    RunLog.close = noted
    run_with(kind, toml, output, 1, "error", "--checkpoint.save_every", "1")


@pytest.mark.parametrize("kind", ["sft", "gppo"])
def test_a_tracker_that_is_slow_to_close_keeps_no_checkpoint_from_being_published(kind: str, tmp_path: Path, ranks):
    toml = SCRIPTS[kind][1].write_run(tmp_path)
    with pytest.raises(ZeroDivisionError):
        ranks(1, noting_what_is_published, kind, toml, tmp_path / "run")
    published = manifest.steps(tmp_path / "run/checkpoints")
    assert published
    assert json.loads((tmp_path / "run/published").read_text()) == published


class SignalledMeanwhile:
    """A world of two ranks: while this one waits for the other's number, a signal comes."""

    rank, size = 0, 2

    def __init__(self, number: int) -> None:
        self.to_come = [number]

    def all_reduce(self, values: list[float], op: object) -> list[float]:
        while self.to_come:
            os.kill(os.getpid(), self.to_come.pop())
        return values


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_ranks_agree_ends_the_next_step(number: int):
    world: Any = SignalledMeanwhile(number)
    with Leaving(world) as leaving:
        assert not leaving.asked(), "the other rank may have answered before"
        assert leaving.asked()
        assert leaving.left(2, Path("step-2")).exit_code == 128 + number


PRESSED_TWICE = """
import os, signal, types
from megatron_klear.runs import leave
leave._SAME_PRESS_SECONDS = 0.0  # two presses, without a wait between them
with leave.Leaving(types.SimpleNamespace(size=1)):
    os.kill(os.getpid(), signal.SIGINT)
    print("the step goes on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""


def test_ctrl_c_pressed_again_ends_at_once():
    command = [sys.executable, "-c", PRESSED_TWICE]
    ran = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=DEADLINE_SECONDS)
    assert ran.returncode == 130
    assert ran.stdout == "the step goes on\n"
    assert "interrupted again: ended without saving" in ran.stderr
