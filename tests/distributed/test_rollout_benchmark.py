"""The benchmark of rollouts: engines draw from the trainer's weights, and the report has every figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

from standin_server import write_standin_python

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_times_all_engines_on_the_trainer_s_weights(tmp_path):
    python, out = write_standin_python(tmp_path / "python"), tmp_path / "rollouts.json"
    command = [sys.executable, ROOT / "tools" / "benchmark" / "rollouts.py", "--vllm", python, "--out", out]
    small = ["--rounds", "1", "--prompts", "2", "--samples", "2", "--mean-tokens", "4", "--max-tokens", "16"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *small], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(out.read_text())
    assert set(report["engines"]) == {"local", "vllm", "transformers"}
    for name, engine in report["engines"].items():
        assert engine["tokens_per_second"] > 0
        assert all(count >= 4 for count in engine["tokens"])
        if name != "transformers":
            assert engine["largest_logprob_difference"] < 1e-4
            assert engine["sync_seconds"] > 0
    assert report["checkpoint_save_seconds"] > 0
    assert report["checkpoint_load_seconds"] > 0
