"""The benchmark of the fused loss runs, and its numbers are in order."""

import importlib.util
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


LISTING = """
        Function : _ZN5klear13one_read_rowsINS_4bf16ES2_Li4EEEvNS_12RowArgumentsE
        /*0000*/                   MOV R1, R2 ;                       /* 0x0 */
        /*0010*/                   LDS.128 R4, [R8] ;                 /* 0x0 */
        /*0020*/               @P0 BRA 0x50 ;                         /* 0x0 */
        /*0030*/                   SEL R4, R4, R5, P1 ;               /* 0x0 */
        /*0040*/                   SEL R5, R4, R5, P1 ;               /* 0x0 */
        /*0050*/                   FMNMX.NAN R4, R4, R9, !PT ;        /* 0x0 */
        /*0060*/                   MUFU.EX2 R4, R4 ;                  /* 0x0 */
        /*0070*/               @P2 BRA 0x90 ;                         /* 0x0 */
        /*0080*/                   MUFU.EX2 R5, R5 ;                  /* 0x0 */
        /*0090*/               @P3 BRA 0x10 ;                         /* 0x0 */
        /*00a0*/                   EXIT ;                             /* 0x0 */
"""


@pytest.fixture
def model(monkeypatch):
    """The script that models the row kernels, as a module."""
    spec = importlib.util.spec_from_file_location("row_kernel_model", ROOT / "tools/benchmark/row_kernel_model.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_model_of_the_row_kernels_counts_the_path_of_full_units(model):
    """It jumps over what only the last unit needs, and over no exponential."""
    ((kernel, types, size, to_size, code),) = model.kernels(LISTING, 151_936)
    assert (kernel, types, size, to_size) == ("one read", "bf16 to bf16", 2, 2)
    (loop,) = model.row_loops(code, size)
    assert (loop.name, loop.issue * 8, loop.mufu * 8) == ("sums", 7, 2)
    answer = model.estimate(kernel, size, to_size, [loop], model.GPUS[0])
    assert answer["bound"] == "memory"
    assert 0 < answer["copy_share"][0] < answer["copy_share"][1] == 1


def test_the_committed_estimates_follow_from_the_committed_counts(model):
    report = json.loads((ROOT / "tools/benchmark/results/row_kernel_model.json").read_text())
    assert len(report["kernels"]) == 9 * len(model.CODES)
    sizes = dict(model.TYPES.values())
    for entry in report["kernels"]:
        size, to_size = (sizes[name] for name in entry["types"].split(" to "))
        found = [model.Loop(**loop) for loop in entry["loops"]]
        gpus = [gpu for gpu in model.GPUS if f"sm_{gpu.architecture}" == entry["architecture"]]
        assert gpus
        posts = model.mailbox_bytes(size, to_size, report["columns"]) if entry["kernel"] == "sharded" else None
        assert entry.get("mailboxes") == posts
        assert entry["estimates"] == [model.estimate(entry["kernel"], size, to_size, found, gpu) for gpu in gpus]


def test_the_code_of_sm_100_issues_less():
    """No loop issues more than before, and one read from bf16 to bf16 needs less of the arithmetic than of memory."""
    report = json.loads((ROOT / "tools/benchmark/results/row_kernel_model.json").read_text())
    rows = {
        (row["pairs"], row["kernel"], row["types"]): row
        for row in report["kernels"]
        if row["architecture"] == "sm_100f"
    }
    assert len(rows) == 18
    for (pairs, *names), row in rows.items():
        for one, before in zip(row["loops"], rows[False, *names]["loops"], strict=True):
            assert one["issue"] < before["issue"] or not pairs or names[0] == "two reads"
            assert one["issue"] <= before["issue"]
    before, after = (rows[pairs, "one read", "bf16 to bf16"]["estimates"][0] for pairs in (False, True))
    assert after["arithmetic_clocks"] < 0.75 * before["arithmetic_clocks"]
    assert after["arithmetic_clocks"] < 0.75 * after["memory_clocks"] < before["arithmetic_clocks"]
