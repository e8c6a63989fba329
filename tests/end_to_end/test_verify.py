"""tools/verify.py: exit codes, tables, and no layout dropped in silence."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from tiny_run import start, write_run

from megatron_klear.verify.layout_report import plan_layouts
from megatron_klear.verify.layouts import LAYOUTS, ragged_samples, stored_samples

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def verify():
    return importlib.import_module("megatron_klear.cli.verify").main


def test_layouts_of_one_process_agree(toml, verify, capsys, tmp_path):
    words = ["layouts", "--config", str(toml), "--processes", "1", "--steps", "1", "--batch", "data"]
    assert verify([*words, "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["layout", "processes", "loss", "grad", "norm", "log-probs", "verdict"]
    assert next(line for line in shown if "reference" in line).startswith("one process")
    assert sum("not possible: takes" in line for line in shown) == sum(layout.processes > 1 for layout in LAYOUTS)
    assert shown[-1].startswith("passed: compared with one process")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] is True
    assert len(found["rows"]) == len(LAYOUTS)


def test_a_breach_is_exit_code_1(toml, verify, capsys):
    words = ["layouts", "--config", str(toml), "--processes", "1", "--steps", "1", "--fused", "both"]
    assert verify([*words, "--tolerance", "0"]) == 1
    shown = capsys.readouterr().out
    assert "DIFFERENT" in shown
    assert "one process, unfused loss" in shown
    assert "FAILED: compared with one process, fused loss" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "verify layouts"),
        (["resume", "--layouts", "TP3"], "--config FILE.toml is required"),
        (["layouts", "--steps", "0"], "at least 1"),
    ],
)
def test_wrong_calls_are_exit_code_2(verify, capsys, words: list[str], told: str):
    try:
        code = verify(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert told in capsys.readouterr().err


def test_resume_prints_its_checks(toml, verify, capsys):
    words = ["resume", "--config", str(toml), "--kills", "1", "--steps", "4", "--layouts"]
    assert verify(words) == 0
    shown = capsys.readouterr().out
    assert "weights and optimizer tensors" in shown
    assert "bitwise equal" in shown
    assert shown.splitlines()[-1].startswith("passed: 4 steps on 1 processes")


def test_impossible_layouts_have_a_reason(toml):
    run = start(toml)
    reasons = {layout.name: reason for layout, reason in plan_layouts(run.config, run.architecture, "config", 4)}
    assert len(reasons) == len(LAYOUTS)
    assert {name for name, reason in reasons.items() if reason} == {"TP2 PP2 CP2 SP"}
    odd = dataclasses.replace(run.architecture, num_layers=3)
    reasons = {layout.name: reason for layout, reason in plan_layouts(run.config, odd, "config", 8)}
    assert "num_hidden_layers 3" in reasons["PP2"]
    assert reasons["TP2"] == ""


def test_torchrun_fills_up_with_data_parallelism(toml):
    run = start(toml)
    planned = list(plan_layouts(run.config, run.architecture, "config", 8, started=4))
    possible = [layout for layout, reason in planned if not reason]
    assert {layout.processes for layout in possible} == {4}
    assert possible[0].data == 4
    assert len({layout.name for layout, _ in planned}) == len(planned)
    assert [layout.name for layout, reason in planned if reason] == ["TP2 PP2 CP2 SP"]


def test_the_batch_holds_the_shortest_and_the_longest_that_fit():
    samples = ragged_samples(50, longest=40, count=30)

    class Store(list):
        @property
        def lengths(self):
            return [len(sample.tokens) for sample in self]

    chosen = [len(sample.tokens) for sample in stored_samples(Store(samples), longest=20)]
    fitting = [length for length in Store(samples).lengths if length <= 20]
    assert len(chosen) == 12
    assert (chosen[0], chosen[1]) == (1, max(fitting))
    assert max(chosen) <= 20
