"""The benchmark of the SFT step: every loop trains on the same samples to the same loss, and the report says all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_times_all_loops_on_equal_losses(tmp_path):
    out = tmp_path / "sft.json"
    command = [sys.executable, ROOT / "tools" / "benchmark" / "sft.py", "--case", "tiny", "--repeats", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--out", out], env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), run.stderr[-2000:]  # exit code 1 may mean a busy machine: speed is not this test's matter
    report = json.loads(out.read_text())
    assert report["device"]
    assert report["threads"] == 1
    (case,) = report["cases"]
    assert set(case["loops"]) == {"engine", "padded", "packed", "one_by_one"}
    assert all(len(loop["seconds_per_step"]) == 1 for loop in case["loops"].values())
    losses = case["loss_before_training"]
    assert losses == pytest.approx(dict.fromkeys(losses, losses["engine"]), rel=1e-4)
    assert set(case["engine_speed_over"]) == {"padded", "packed", "one_by_one"}
