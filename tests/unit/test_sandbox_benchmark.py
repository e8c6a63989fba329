"""The sandbox's benchmark, shorter: it measures every way, and sees a leak."""

import json
import subprocess
import sys

import pytest

from tests.sandboxes import ROOT, needs_bubblewrap
from tools.benchmark import sandbox as benchmark


@needs_bubblewrap
def test_it_measures_and_nothing_leaks(tmp_path):
    out = tmp_path / "sandbox.json"
    sizes = {"--rounds": 1, "--seconds": 0.1, "--samples": 4, "--executions": 320, "--tests": 8, "--workers": 1}
    command = [sys.executable, "tools/benchmark/sandbox.py", "--out", out, *sum(sizes.items(), ())]
    ran = subprocess.run([str(one) for one in command], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert ran.returncode in (0, 1), ran.stderr
    report = json.loads(out.read_text())
    assert len(report["throughput"]) == 4
    assert all(way["tests"] > 0 and way["computing_seconds"] > 0 for way in report["throughput"].values())
    assert report["step"]["tests"] == 4 * 8
    assert report["leaks"]["executions"] == 320
    assert not [words for words in report["missed"] if "grew" in words]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"ratio": 9.0}, "9.0 times plain Python"),
        ({"computing_seconds": 121.0}, "a step takes 121 s"),
        ({"descriptors": 9}, "descriptors grew from 8 to 9"),
        ({"zygote_bytes": 10 << 20}, "zygote_bytes grew"),
    ],
)
def test_a_missed_target_is_told(change, words):
    def get(name, value):
        return change.get(name, value)

    held = {"descriptors": 8, "zygote_bytes": 1 << 20}
    report = {
        "tests": 16,
        "throughput": {"slot, 16 tests in one process": {"ratio": get("ratio", 20.0)}},
        "step": {"computing_seconds": get("computing_seconds", 10.0)},
        "leaks": {"early": held, "late": {name: get(name, value) for name, value in held.items()}},
    }
    found = benchmark.missed(report)
    assert found == [] if words is None else words in found[0]
