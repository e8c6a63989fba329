"""The orchestrator alone is killed at random: each time the run ends in words, and started again it is the same run.

Three kills; twenty where KLEAR_KILL_ORCHESTRATOR=1 asks for them.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from standin_server import processes_of
from test_gppo_resume import final, rollouts
from tiny_rl_run import start, write_run

from megatron_klear.verify.killed_run import at_output, read_metrics
from megatron_klear.verify.resume import check_metrics, check_state

ROOT = Path(__file__).resolve().parents[2]
GONE_SECONDS = 15.0


def orchestrator_of(trainer: int) -> int | None:
    """The process id of a trainer's orchestrator, None before it is there."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == trainer and b"orchestrator.process import" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:  # it has ended
            continue
    return None


def kill_until_done(toml: Path, output: Path, kills: int, chance: random.Random) -> list[str]:
    """Train; what each run that was killed said. The kill comes within seconds of the first step after a start."""
    said = []
    while True:
        log = output.with_name(f"{output.name}-{len(said)}.txt")
        metrics, before = output / "metrics.jsonl", None
        with log.open("wb") as out:
            command = [sys.executable, "train_gppo.py", "--config", str(toml), "--output", str(output)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        early = chance.random() < 0.3
        while run.poll() is None and len(said) < kills:
            time.sleep(0.02)
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            before = lines if before is None else before
            orchestrator = orchestrator_of(run.pid)
            if orchestrator is not None and (early or lines > before):
                time.sleep(chance.uniform(0.0, 6.0 if early else 0.3))
                os.kill(orchestrator, signal.SIGKILL)
                killed_at = time.monotonic()
                run.wait(60)
                if run.returncode:
                    assert time.monotonic() - killed_at < GONE_SECONDS
                    said.append(log.read_text())
                break
        if run.wait(240) == 0:
            return said
        assert len(said) <= kills


@pytest.mark.slow
def test_kills_of_the_orchestrator_leave_no_trace(tmp_path: Path):
    toml = write_run(tmp_path)
    kills = 20 if os.environ.get("KLEAR_KILL_ORCHESTRATOR") == "1" else 3
    toml.write_text(toml.read_text().replace("steps = 5", f"steps = {4 * kills}"))
    uninterrupted = at_output(start(toml), tmp_path / "uninterrupted")
    # By the same program: one in a fork of this process rounds otherwise, since nothing is compiled there.
    assert kill_until_done(toml, uninterrupted.config.output, 0, random.Random(0)) == []
    killed = at_output(uninterrupted, tmp_path / "killed")
    said = kill_until_done(toml, killed.config.output, kills, random.Random(5))
    assert len(said) == kills
    assert all("the orchestrator's process was ended by signal 9 (SIGKILL)" in words for words in said)
    steps = killed.config.train.steps
    checks = [
        *check_state(final(uninterrupted), final(killed)),
        check_metrics(read_metrics(uninterrupted), read_metrics(killed), steps),
    ]
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert rollouts(uninterrupted) == rollouts(killed)
    assert processes_of(tmp_path) == []
