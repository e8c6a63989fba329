"""Runs with servers that are killed at random, and a trainer that is, too: they end with every prompt used once.

Most servers stand in for vLLM's (tests/standin) and start in seconds. vLLM's own take half a minute each time: they are
killed a few times, and twenty times where KLEAR_KILL_VLLM=1 asks for it.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from standin_server import processes_of, processes_with, requests_at, write_standin_python
from tiny_rl_run import TOML
from vllm_server import vllm_python

from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.runs.rollout_files import read_samples, rollout_file

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, PER_STEP, STEPS = 40, 4, 40
KILLED_STEPS = 28  # of them, in which servers are killed
SHAPE = TinyShape(hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=32)
ROLLOUT = """
[rollout]
kind = "vllm"
mode = "{mode}"
request_seconds = 20
deadline_seconds = {deadline}
server = {{ python = "{python}", device = "cpu", count = 2, max_restarts = 100, kv_cache_gib = 0.1 }}
"""
pytestmark = pytest.mark.slow


def write_settings(folder: Path, mode: str, python: Path, deadline: int = 120) -> Path:
    """A run over whole epochs of its prompts, every group of which counts; long responses, so that kills meet some."""
    write_tiny_model(folder / "model", "qwen3", SHAPE, weights=False)
    text = TOML.format(folder=folder, stops=[1])
    text = text.replace("steps = 5", f"steps = {STEPS}").replace("max_tokens = 12", "max_tokens = 200")
    text = text.replace("tokens_per_microbatch = 160", "tokens_per_microbatch = 512")
    text = text.replace("max_generation_rounds = 2", "max_generation_rounds = 1\ndrop_zero_advantage = false")
    (folder / "run.toml").write_text(text + ROLLOUT.format(mode=mode, python=python, deadline=deadline))
    return folder / "run.toml"


def start_run(toml: Path, log: Path) -> subprocess.Popen[bytes]:
    """The training script, in the background."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as out:
        command = [sys.executable, "train_gppo.py", "--config", str(toml)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def steps_of(folder: Path) -> list[dict]:
    """The run's metrics so far."""
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def used_prompts(folder: Path) -> Counter[str]:
    """How often each prompt was sampled for a step that stands."""
    counts: Counter[str] = Counter()
    for step in range(1, STEPS + 1):
        samples = read_samples(rollout_file(folder / "run" / "rollouts", step))[1]
        counts += Counter({sample["prompt_id"] for sample in samples})
    return counts


def wait_until_drawing(python: Path, server: int, seconds: float = 5.0) -> None:
    """Wait until a stand-in draws; or it is gone, or nothing comes for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not requests_at(python, server) and cpu_seconds(server) is not None:
        time.sleep(0.01)


def wait_until_busy(server: int, seconds: float = 5.0) -> None:
    """Wait until a server's processes compute, as while it draws; or it is gone, or nothing comes for so long."""
    deadline, before = time.monotonic() + seconds, cpu_seconds(server)
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = cpu_seconds(server)
        if now is None or before is None or now - before >= 0.03:
            return
        before = now


def cpu_seconds(leader: int) -> float | None:
    """Processor time of a process and of all others of its group, None where it is gone."""
    try:
        group, total = os.getpgid(leader), 0
    except ProcessLookupError:
        return None
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has ended
            fields = entry.read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12]) if int(fields[2]) == group else 0
    return total / os.sysconf("SC_CLK_TCK")


def kill_until_done(
    folder: Path,
    toml: Path,
    server_kills: int,
    trainer_kills: int,
    wait_for_work: Callable[[int], None],
    *,
    hold: bool,
    seconds: float = 2300,
) -> tuple[int, int]:
    """Kill servers and the trainer at random moments, start the trainer again; how often each was killed."""
    chance, log = random.Random(0), folder / "log.txt"
    servers = trainers = before = 0
    run, deadline = start_run(toml, log), time.monotonic() + seconds
    while run.poll() is None:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(chance.uniform(0.05, 0.35))
        done = len(steps_of(folder))
        living = processes_of(folder, "-m", "vllm.entrypoints")
        # Spread over the run but its end; and never while servers start for the first time: that ends a run, with a
        # message. A trainer whose servers draw ahead is held meanwhile, or it would be through before they are back.
        due = done > before and servers < server_kills and done >= servers * KILLED_STEPS // server_kills
        if hold:
            run.send_signal(signal.SIGSTOP if due else signal.SIGCONT)
        if due and living:
            victim = chance.choice(living)
            wait_for_work(victim)
            with contextlib.suppress(ProcessLookupError):  # it ended by itself, which is no kill
                os.kill(victim, signal.SIGKILL)
                servers += 1
        elif due:
            continue
        elif trainers < trainer_kills and done >= (trainers + 1) * STEPS // (trainer_kills + 2):
            run.kill()
            run.wait()
            trainers += 1
            run, before = start_run(toml, log), len(steps_of(folder))
    assert run.returncode == 0, log.read_text()[-3000:]
    return servers, trainers


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("mode", "kills"), [("asynchronous", (20, 5)), ("synchronous", (5, 1))])
def test_killed_servers_and_trainers_cost_no_prompt(tmp_path, mode: str, kills: tuple[int, int]):
    python = write_standin_python(tmp_path / "python")
    toml = write_settings(tmp_path, mode, python)
    hold = mode == "asynchronous"
    assert kill_until_done(tmp_path, toml, *kills, partial(wait_until_drawing, python), hold=hold) == kills
    assert_nothing_was_lost(tmp_path, mode, met=True)


@pytest.mark.vllm
@pytest.mark.timeout(3600)
def test_killed_vllm_servers_and_trainers_cost_no_prompt(tmp_path):
    python = vllm_python()
    assert python is not None
    toml, before = write_settings(tmp_path, "asynchronous", python, 600), processes_with("VLLM::")
    kills = (20, 5) if os.environ.get("KLEAR_KILL_VLLM") == "1" else (3, 1)
    assert kill_until_done(tmp_path, toml, *kills, wait_until_busy, hold=True, seconds=3500) == kills
    assert_nothing_was_lost(tmp_path, "asynchronous", met=kills[0] >= 20)
    assert set(processes_with("VLLM::")) <= set(before), "engines that outlived their server"


def assert_nothing_was_lost(tmp_path: Path, mode: str, *, met: bool) -> None:
    """Every step is there once, every prompt was used as often as any other, and no process is left.

    With `met`, some responses were under way when their server was killed; of a few kills all may miss.
    """
    records = steps_of(tmp_path)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert sum(record["groups_dropped"] for record in records) == 0
    assert not met or sum(record["server_retries"] for record in records) > 0, "no kill met a response under way"
    counts = used_prompts(tmp_path)
    assert len(counts) == PROMPTS
    if mode == "synchronous":
        assert set(counts.values()) == {STEPS * PER_STEP // PROMPTS}
    else:  # groups of the next epoch may overtake the last ones of this
        assert sum(counts.values()) == STEPS * PER_STEP
        assert max(counts.values()) - min(counts.values()) <= 1
    deadline = time.monotonic() + 15
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(tmp_path) == []
