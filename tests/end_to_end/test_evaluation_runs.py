"""`evaluate.py` killed at twenty instants, or over two processes, ends in the files of the one that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.cli.evaluate import main
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
    # By both, whichever comes first: a child is killed with its processes from the beginning.
    os.setpgid(child, child)
    if child:
        return child
    try:
        main(arguments)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)

for kill in range(kills):
    # Instants spread over all that is to be written, and within the work on the next piece.
    child, at, end = start(), 0.95 * whole * (kill + rng.random()) / kills, None
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

# A process of torchrun. What a thread of the group's that is left does as the interpreter ends aborts it, one time
# in twenty, so they are looked for.
MEMBER = """
import sys
from pathlib import Path
from megatron_klear.cli.evaluate import main

main(sys.argv[1:])
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
sys.exit("left behind: " + " ".join(threads) if any("gloo" in thread for thread in threads) else 0)
"""


def evaluate(config: Path, output: Path, *driver: str) -> str:
    """Run it, by a driver or alone, to its end; what it printed."""
    command = driver or ("-m", "megatron_klear.cli", "evaluate")
    ran = subprocess.run(
        [sys.executable, *command, "--config", str(config), "--output", str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Settings of a tiny evaluation, and the folder of it that nobody stopped."""
    folder = tmp_path_factory.mktemp("evaluation")
    shape = TinyShape(max_positions=96, num_layers=2, initializer_range=0.2)
    model = write_tiny_model(folder / "model", "qwen3", shape)
    problems = folder / "sums.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{n}+1?", "answer": f"{n + 1}"}) + "\n" for n in range(40)))
    config = folder / "evaluate.toml"
    config.write_text(
        f"""
        model = {{ path = "{model}", dtype = "fp32", max_sequences = 4 }}
        reward = {{ require_thinking = false, workers = 1 }}
        sampling = {{ max_tokens = 24 }}
        benchmarks = [{{ name = "amc", files = ["{problems}"], samples = 4 }}]
        """
    )
    evaluate(config, folder / "whole")
    return config, folder / "whole"


def check_same(folder: Path, whole: Path) -> None:
    """The same lines, whatever their order, and the same table."""
    for path in (whole / "amc").iterdir():
        lines, again = (sorted(p.read_text().splitlines()) for p in (path, folder / "amc" / path.name))
        assert again == lines, path.name
    assert (folder / "table.md").read_text() == (whole / "table.md").read_text()


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(whole: tuple[Path, Path], tmp_path: Path):
    config, folder = whole
    size = sum(path.stat().st_size for path in (folder / "amc").glob("*.jsonl"))
    told = evaluate(config, tmp_path / "killed", "-c", DRIVER, str(tmp_path / "killed"), str(size), str(KILLS))
    assert told.count("killed at") == KILLS
    assert len(set(told.splitlines())) > KILLS // 2, "the kills met the same instant"
    check_same(tmp_path / "killed", folder)


def test_two_processes_draw_what_one_does(whole: tuple[Path, Path], tmp_path: Path):
    config, folder = whole
    (tmp_path / "member.py").write_text(MEMBER)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(tmp_path / "member.py"))
    told = evaluate(config, tmp_path / "two", *torchrun)
    assert told.count("| amc | 40 x 4 |") == 1
    check_same(tmp_path / "two", folder)


def test_a_dry_run_says_what_would_be_drawn(whole: tuple[Path, Path], tmp_path: Path, capsys):
    main(["--config", str(whole[0]), "--output", str(tmp_path / "none"), "--dry-run", "--sampling.top-k", "5"])
    words = "temperature 0.6, top_p 0.95, top_k 5, 24 tokens"
    assert capsys.readouterr().out == f"amc: 40 problems x 4 = 160 responses, {words}\n"
    assert not (tmp_path / "none").exists()
