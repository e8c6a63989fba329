"""Two torchrun agents over a c10d rendezvous: one is killed, and the other goes on from the newest checkpoint."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from tiny_run import metrics, start, write_run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


def agent(toml: Path, port: int, *, host: bool) -> subprocess.Popen[bytes]:
    """A node's agent with one worker; it goes on with one node where the other is lost."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-id=job", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    command += [f"--rdzv-conf=is_host={int(host)},last_call_timeout=10", str(ROOT / "pretrain_sft.py")]
    command += ["--config", str(toml), "--train.steps", str(STEPS), "--checkpoint.save_every", "1"]
    log = (toml.parent / f"agent-{'host' if host else 'guest'}.log").open("w")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def kill_node(of: subprocess.Popen[bytes]) -> None:
    """As a node's loss: the agent and all below it, at once."""
    processes = [psutil.Process(of.pid), *psutil.Process(of.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    of.wait()


def world_sizes(output: Path) -> list[int]:
    """How many nodes wrote each checkpoint, in order."""
    written = sorted((output / "checkpoints").glob("step-*/training.json"))
    return [json.loads(path.read_text())["world_size"] for path in written]


def test_a_lost_node_costs_no_step(tmp_path: Path) -> None:
    toml = write_run(tmp_path)
    output = start(toml).config.output
    port = free_port()
    agents = [agent(toml, port, host=True), agent(toml, port, host=False)]
    try:
        deadline = time.monotonic() + 240
        while world_sizes(output).count(2) < 3:
            assert time.monotonic() < deadline, (tmp_path / "agent-host.log").read_text()
            assert agents[0].poll() is None, (tmp_path / "agent-host.log").read_text()
            psutil.wait_procs([psutil.Process(agents[0].pid)], timeout=0.1)
        kill_node(agents[1])
        assert agents[0].wait(timeout=240) == 0, (tmp_path / "agent-host.log").read_text()
    finally:
        for one in agents:
            if one.poll() is None:
                kill_node(one)
    told = (tmp_path / "agent-host.log").read_text()
    assert "resuming from" in told
    assert world_sizes(output)[-1] == 1, "the last checkpoint was written by the one node that was left"
    found = metrics(start(toml))
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))

    (tmp_path / "alone").mkdir()
    alone = write_run(tmp_path / "alone")
    command = [sys.executable, str(ROOT / "pretrain_sft.py"), "--config", str(alone), "--train.steps", str(STEPS)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    for ours, theirs in zip(found, metrics(start(alone)), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-5 * abs(theirs["loss"])
