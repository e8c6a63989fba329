"""The entry script as people start it: alone, under torchrun, and for its plan."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_rl_run
from tiny_run import write_run

from megatron_klear.cli import gppo, sft
from megatron_klear.mcore.checkpoints import manifest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "pretrain_sft.py")
REQUIRED = {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second"}


def call(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended


def records(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run of 20 steps over the example rows."""
    folder = tmp_path_factory.mktemp("trained")
    toml = write_run(folder)
    rows = str(ROOT / "examples/data/arithmetic_600.jsonl")
    told = call(
        SCRIPT, "--config", str(toml), "--data.train", rows, "--train.steps", "20", "--checkpoint.save_every", "10",
        "--optimizer.learning_rate", "5e-3", "--logging.tensorboard", "true",
    ).stdout  # fmt: skip
    assert "step 20/20" in told
    return folder


def test_a_run_learns_and_leaves_what_it_should(trained: Path):
    run = trained / "run"
    found = records(run)
    assert [record["step"] for record in found] == list(range(1, 21))
    assert all(record.keys() >= REQUIRED for record in found)
    assert found[0]["loss"] == pytest.approx(6.24, abs=0.1)  # ln 512
    assert found[-1]["loss"] < found[0]["loss"] - 1.0
    assert all(record["tokens_per_second"] > 0 for record in found)
    assert manifest.steps(run / "checkpoints") == [10, 20]
    assert manifest.damage(manifest.step_folder(run / "checkpoints", 20)) == []
    assert "learning_rate = 0.005" in (run / "config.toml").read_text()
    assert list((run / "tensorboard").iterdir())


def test_a_finished_run_is_left_as_it_is(trained: Path):
    run = trained / "run"
    changing = ("tensorboard", ".owner")  # the latter names the process that has the folder now
    files = [path for path in run.rglob("*") if path.is_file() and not any(part in str(path) for part in changing)]
    before = {path: path.read_bytes() for path in files}
    call(SCRIPT, "--config", str(run / "config.toml"))
    assert {path: path.read_bytes() for path in before} == before


def test_two_processes_begin_with_the_same_loss(trained: Path, tmp_path: Path):
    told = call(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT,
        "--config", str(trained / "run/config.toml"), "--parallel.tensor", "2", "--output", str(tmp_path / "run"),
        "--train.steps", "1", "--optimizer.decay", "constant",
    )  # fmt: skip
    alone, both = records(trained / "run")[0], records(tmp_path / "run")[0]
    for key in ("loss", "grad_norm", "num_tokens"):
        assert both[key] == pytest.approx(alone[key], rel=1e-5), told.stdout
    assert manifest.read_training(tmp_path / "run/checkpoints/step-00000001")["world_size"] == 2


def test_a_dry_run_prints_a_plan_and_writes_nothing(trained: Path, tmp_path: Path):
    told = call(SCRIPT, "--config", str(trained / "run.toml"), "--output", str(tmp_path / "run"), "--dry-run=2").stdout
    assert "data 2" in told
    assert "optimizer state" in told
    assert not (tmp_path / "run").exists()
    refused = call(SCRIPT, "--config", str(trained / "run.toml"), "--dry-run=3", code=2)
    assert "rows_per_step 2" in refused.stderr


def searched_in_training(command, module: str, toml: Path) -> tuple[int, int]:
    """Objects that the collector searches before a training command, and where its training begins."""
    gc.unfreeze()  # what this rank was forked with
    before, searched = len(gc.get_objects()), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"megatron_klear.train.{module}.run", lambda start: searched.append(len(gc.get_objects())))
        command(["--config", str(toml)])
    return before, searched[0]


@pytest.mark.parametrize(
    ("command", "module", "write"), [(sft.main, "sft", write_run), (gppo.main, "rl_run", tiny_rl_run.write_run)]
)
def test_collections_at_saves_leave_out_what_was_imported(command, module: str, write, tmp_path: Path, ranks):
    before, searched = ranks(1, searched_in_training, command, module, write(tmp_path))[0]
    assert searched < before / 20
