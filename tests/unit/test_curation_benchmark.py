"""The benchmark of curation runs, and its two scans flag the same documents."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "benchmark" / "curation.py"


pytest.importorskip("rensa", reason="the extra `curation` is not installed")


def test_a_short_run_flags_what_was_planted(tmp_path):
    out = tmp_path / "curation.json"
    command = [sys.executable, str(SCRIPT), "--documents", "2000", "--out", str(out)]
    ran = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert ran.stdout.splitlines()[-1].endswith("precision 1: met"), ran.stderr
    assert json.loads(out.read_text())["flagged"] == 20
