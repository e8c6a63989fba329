"""`evaluate.py` killed at twenty instants, each time started again, ends in the files of the one that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.data.tiny import TinyShape, write_tiny_model

KILLS = 20
# One process that has everything imported, and no thread yet, forks the evaluations: a start costs no import.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch, transformers
from megatron_klear.cli.evaluate import main
from megatron_klear.evaluation import run, sampling  # what main imports late
from megatron_klear.rollout.local import engine

output, whole, kills, arguments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
rng = random.Random(1)

def written():
    return sum(path.stat().st_size for path in output.rglob("*.jsonl"))

def start():
    child = os.fork()
    if child:
        return child
    os.setsid()
    try:
        main(arguments)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)

for kill in range(kills):
    # Instants spread over all that is to be written, and within the work on the next piece.
    child, at, end = start(), whole * (kill + rng.random()) / kills, None
    while written() < at:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            sys.exit("it ended before it was killed")
        time.sleep(0.001)
    time.sleep(rng.random() * 0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed at", written())
child = start()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path):
    shape = TinyShape(max_positions=96, num_layers=2, initializer_range=0.2)
    model = write_tiny_model(tmp_path / "model", "qwen3", shape)
    problems = tmp_path / "sums.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{n}+1?", "answer": f"{n + 1}"}) + "\n" for n in range(40)))
    config = tmp_path / "evaluate.toml"
    config.write_text(
        f"""
        model = {{ path = "{model}", dtype = "fp32", max_sequences = 4 }}
        reward = {{ require_thinking = false, workers = 1 }}
        sampling = {{ max_tokens = 24 }}
        benchmarks = [{{ name = "amc", files = ["{problems}"], samples = 4 }}]
        """
    )

    def run(output: Path, *driver: str) -> str:
        arguments = ["--config", str(config), "--output", str(output)]
        command = [*driver, *arguments] if driver else ["-m", "megatron_klear.cli", "evaluate", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [sys.executable, *command], env=environment, text=True, capture_output=True, timeout=600, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    run(tmp_path / "whole")
    files = {path.name: path for path in (tmp_path / "whole" / "amc").iterdir()}
    size = sum(path.stat().st_size for name, path in files.items() if name.endswith(".jsonl"))
    told = run(tmp_path / "killed", "-c", DRIVER, str(tmp_path / "killed"), str(size), str(KILLS))
    assert told.count("killed at") == KILLS
    assert len(set(told.splitlines())) > KILLS // 2, "the kills met the same instant"
    for name, path in files.items():
        lines, again = (sorted(p.read_text().splitlines()) for p in (path, tmp_path / "killed" / "amc" / name))
        assert again == lines, name
    tables = [(tmp_path / folder / "table.md").read_text() for folder in ("whole", "killed")]
    assert tables[0] == tables[1]
