"""The benchmark of the fused loss runs, and its numbers are in order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.kernels import available

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not available().built, reason="the extension is not built")
def test_runs_and_writes_its_numbers(tmp_path):
    out = tmp_path / "result.json"
    options = ["--device", "cpu", "--sizes", "tiny", "--only", "ours", "--repeats", "1", "--out", str(out)]
    command = [sys.executable, str(ROOT / "tools/benchmark/policy_loss.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert [(r["start"], r["dtype"]) for r in report["results"]] == [
        ("hidden", "float32"),
        ("hidden", "float32"),
        ("logits", "float32"),
        ("logits", "bfloat16"),
    ]
    for result in report["results"]:
        assert result["failure"] is None
        assert result["milliseconds"] > 0
        assert result["gradient_error"] < (1e-5 if result["dtype"] == "float32" else 1e-2)
    assert report["device"]
    assert report["floors"]["tiny"]["copy_gigabytes_per_second"] > 0
