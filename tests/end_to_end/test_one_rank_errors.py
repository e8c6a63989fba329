"""Errors of one process of a run: each is told by it, and every process is gone within seconds.

The first two of the errors run always, all of them where KLEAR_PLANT_ALL=1 asks for it: each starts a job of two ranks.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from standin_server import processes_of
from tiny_rl_run import write_run

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 15.0
REWARDS = """
import os, time

FOLDER = {folder!r}

def hangs(response, truth):
    if "made up" not in response:
        open(FOLDER + "/planted", "a").write(repr(time.time()))
        time.sleep(1000)
    return 0.0
"""
FAULTS = {
    "orchestrator killed while training": "the orchestrator's process was ended by signal 9 (SIGKILL)",
    "rank killed": "Signal 9 (SIGKILL)",
    "orchestrator killed in a call": "the orchestrator's process was ended by signal 9 (SIGKILL)",
    "rank raises": "planted in a step",
    "first rank raises": "planted in a step",
    "out of memory": "MemoryError: planted",
    "checkpoint": "No space left on device",
    "rollout file": "No space left on device",
    "metrics file": "No space left on device",
    "wandb": "wandb says no",
    "reward missing": "no reward for data_source 'poetry'",
    "reward hangs": "could not be graded",
    "reward broken": "cannot be imported",
}
ALWAYS = 2
PROBLEM = '{"data_source": "poetry", "prompt": "a", "reward_model": {"ground_truth": "b"}}\n'


def settings(folder: Path, fault: str) -> list[str]:
    """Arguments of a run in which the fault can happen."""
    toml = write_run(folder)
    arguments = ["--config", str(toml), "--train.keep_rollouts", "true"]
    if fault == "wandb":
        return [*arguments, "--logging.wandb_project", "planted"]
    if fault.startswith("reward"):
        (folder / "planted_rewards.py").write_text(REWARDS.format(folder=str(folder)))
        text = toml.read_text()
        if fault == "reward missing":
            (folder / "problems.jsonl").write_text(PROBLEM * 8)
            start, end = text.index("sources ="), text.index("\n", text.index("sources ="))
            text = text[:start] + f'sources = [{{ files = ["{folder}/problems.jsonl"] }}]' + text[end:]
        name = "hangs" if fault == "reward hangs" else "not_there"
        functions = f'timeout_seconds = 1.0\n[reward.functions]\narithmetic = "planted_rewards:{name}"\n'
        toml.write_text(text.replace("workers = 1\n", "workers = 2\n" + functions))
    return arguments


@pytest.mark.parametrize("fault", list(FAULTS))
def test_it_is_told_and_every_process_is_gone(tmp_path: Path, fault: str):
    if list(FAULTS).index(fault) >= ALWAYS and os.environ.get("KLEAR_PLANT_ALL") != "1":
        pytest.skip("KLEAR_PLANT_ALL=1 plants all of them")
    log, arguments = tmp_path / "log.txt", settings(tmp_path, fault)
    (tmp_path / "wandb.py").write_text("")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PLANTED_FOLDER": str(tmp_path),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{tmp_path}",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    with log.open("wb") as out:
        job = subprocess.Popen(
            [*launch, "tests/planted_errors.py", fault, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=out
        )
        try:
            job.wait(240)
        except subprocess.TimeoutExpired:
            pytest.fail(log.read_text()[-4000:])
    while processes_of(tmp_path):
        time.sleep(0.1)
    ended, told = time.time(), log.read_text()
    assert job.returncode != 0
    assert FAULTS[fault] in told, told[-4000:]
    if (tmp_path / "planted").exists():
        planted = float((tmp_path / "planted").read_text().split("0.0")[0][:17])
        assert ended - planted < SECONDS, told[-4000:]
    else:
        assert fault in ("reward missing", "reward broken"), "the error did not happen"
