"""The GPU suite's table, from result files of the benchmarks' own forms; and that the suite stops without a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tools/benchmark/results"


def table(folder: Path) -> dict[str, list[str]]:
    """Figure, goal and verdict by the name of the line."""
    command = [sys.executable, str(ROOT / "tools/benchmark/gpu_table.py"), str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {what: rest for what, *rest in cells[2:]}


def test_what_has_not_run_is_said(tmp_path: Path) -> None:
    found = table(tmp_path)
    assert len(found) == 7
    assert {figure for figure, *_ in found.values()} == {"not run"}
    assert {verdict for *_, verdict in found.values()} == {""}


def test_figures_stand_beside_their_goals(tmp_path: Path) -> None:
    """Forms of the committed results of the CPU, a card's memory put in."""
    sft = json.loads((RESULTS / "sft_cpu.json").read_text())
    case = sft["cases"][0]
    case["loops"]["engine"] |= {"peak_gib": 40.0, "mfu": 0.4}
    case |= {"planned_gib": 47.0, "engine_speed_over": {"padded": 1.5, "packed": 0.8}}
    (tmp_path / "sft_cuda_tiny.json").write_text(json.dumps(sft))
    loss = json.loads((RESULTS / "policy_loss_cpu.json").read_text())
    loss["checks"] = {"32k: 1.10 of three products, 1.20 allowed": True, "32k: 4.00 GB extra, 3 allowed": False}
    (tmp_path / "policy_loss_cuda_32k.json").write_text(json.dumps(loss))
    (tmp_path / "rollouts_cuda.json").write_text((RESULTS / "rollouts_cpu.json").read_text())
    summary = {"accuracy_sft": 0.31, "accuracy_gppo": 0.72, "seconds": 60.0}
    (tmp_path / "quickstart_cuda.json").write_text(json.dumps(summary))
    (tmp_path / "gpu_tests.xml").write_text(
        '<testsuites><testsuite tests="12" failures="1" errors="0" skipped="2"/></testsuites>'
    )
    found = table(tmp_path)
    name = f"SFT {case['case']}"
    assert found["tests marked gpu"] == ["9 of 10 passed, 2 skipped", "all pass", "**missed**"]
    assert found[f"{name}: memory"] == ["47.0 planned, 40.0 GiB measured", "within 10%", "**missed**"]
    assert found[f"{name}: speed over padded"][1:] == [">= 1.0", "met"]
    assert found[f"{name}: speed over packed"][1:] == [">= 0.9", "**missed**"]
    assert found["policy loss, 4k tokens"][0] == "not run"
    assert found["policy loss, 32k"] == ["32k: 4.00 GB extra", "3 allowed", "**missed**"]  # the last of its two
    assert found["quickstart: SFT, then GPPO"] == ["31.0% -> 72.0%, 60 s", "GPPO gains", "met"]
    assert sum(what.startswith("rollouts: ") for what in found) == 3


def test_the_suite_says_that_there_is_no_device(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", str(ROOT / "tools/benchmark/gpu_suite.sh")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "torch sees no CUDA device" in ran.stdout
    assert list(tmp_path.iterdir()) == []
