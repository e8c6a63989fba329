"""Programs from a tiny model, run in the sandbox and trained on, as the recipe does it, also after a stop."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.verify.resume import check_metrics

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]
SHORT = (
    *("--algorithm.prompts_per_step", "4", "--algorithm.prompts_per_update", "4", "--sampling.samples_per_prompt", "4"),
    *(
        "--sampling.max_tokens",
        "64",
        "--validation.every",
        "0",
        "--checkpoint.save_every",
        "1",
        "--reward.workers",
        "2",
    ),
    *("--rollout.max_sequences", "16", "--optimizer.decay", "constant", "--logging.tensorboard", "false"),
)


def run(folder: Path, *command: str, **more) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data of functions with one case, and a model that has begun to learn to write them."""
    folder = tmp_path_factory.mktemp("code")
    data = "runs/code_tiny_data"
    code = (str(ROOT / "tools/prepare_data.py"), "code", "--cases", "1")
    shape = ["--layers", "2", "--hidden", "64", "--ffn", "128", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
    for command in (
        (*code, "--count", "20", "--seed", "1000", "--output", f"{data}/held_out.jsonl"),
        (*code, "--count", "2000", "--seed", "1", "--output", f"{data}/sft.jsonl"),
        (*code, "--count", "200", "--seed", "2", "--output", f"{data}/problems.jsonl"),
        (str(ROOT / "tools/make_tiny_model.py"), "--output", f"{data}/model", "--no-weights", *shape),
        (
            *(str(ROOT / "pretrain_sft.py"), "--config", str(ROOT / "examples/sft_code_tiny_cpu.toml")),
            *("--train.steps", "140", "--logging.tensorboard", "false"),
        ),
    ):
        done = run(folder, *command)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def gppo(folder: Path, output: str, steps: int, *flags: str, **more) -> subprocess.CompletedProcess[str]:
    config = ("--config", str(ROOT / "examples/gppo_code_tiny_cpu.toml"), "--output", output)
    return run(folder, str(ROOT / "train_gppo.py"), *config, *SHORT, "--train.steps", str(steps), *flags, **more)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_programs_are_run_and_a_stopped_run_goes_on_to_the_same(folder):
    whole = gppo(folder, "runs/whole", 4)
    assert whole.returncode == 0, whole.stderr[-3000:]
    for steps in (2, 4):
        part = gppo(folder, "runs/parts", steps)
        assert part.returncode == 0, part.stderr[-3000:]
    expected, found = metrics(folder / "runs/whole"), metrics(folder / "runs/parts")
    check = check_metrics(expected, found, 4)
    assert check.passed, check
    assert max(record["reward_mean"] for record in expected) > 0.02, "no program passed a test"


def test_a_machine_that_can_have_no_sandbox_is_told_before_the_first_step(folder):
    refused = gppo(folder, "runs/refused", 1, PATH="/nonexistent")
    assert refused.returncode != 0
    assert "bubblewrap" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not metrics(folder / "runs/refused")
