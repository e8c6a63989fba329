"""`klear grade code`: rows in, the same rows with reward, passed, total and verdict out."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from code_sandbox import DATA, fenced, shared_sandbox

from megatron_klear.cli.grade import main

ROOT = Path(__file__).resolve().parent.parent.parent
SQUARES = {"inputs": ["2\n", "3\n"], "outputs": ["4\n", "9\n"]}
NESTED: Any = functools.reduce(lambda inner, _: [inner], range(500), [])
ADDED = ("reward", "passed", "total", "verdict")


def graded(tmp_path: Path, rows: list[dict[str, Any]], *options: str) -> list[dict[str, Any]]:
    shared_sandbox()
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["code", "--input", str(given), "--output", str(output), "--workers", "1", "--cpu-seconds", "1", *options])
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{key: row[key] for key in row if key not in {*ADDED, "verdict_note"}} for row in found] == rows
    return found


def test_rows_come_back_with_what_they_are_worth(tmp_path: Path) -> None:
    half = "n = int(input())\nprint(4)"
    tests = {"functional": "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)"}
    rows = [
        {"id": 0, "response": fenced("print(int(input()) ** 2)"), "tests": SQUARES},
        {"id": 1, "program": f"'''\n```\n'''\n{half}", "tests": json.dumps(SQUARES)},
        {"id": 2, "response": half, "tests": [{"input": "2", "output": "4"}, {"input": "3", "output": "9"}]},
        {"id": 3, "response": "I do not know.", "tests": SQUARES, "note": "kept"},
        {"id": 4, "program": "def f(x):\n    return x + x", "tests": tests},
        {"id": 5, "program": "while True:\n    pass", "tests": {"inputs": [""], "outputs": ["1"]}},
        {"id": 6, "program": "import os\nos.fork()", "tests": {"inputs": [""], "outputs": ["1"]}},
        {"id": 7, "program": "x = '</think>'\nprint(len(x))", "tests": {"inputs": [""], "outputs": ["8"]}},
        {
            "id": 8,
            "response": "<think>```python\nx\n```</think>\nprint(8)",
            "tests": {"inputs": [""], "outputs": ["8"]},
        },
    ]
    found = [tuple(row[key] for key in ADDED) for row in graded(tmp_path, rows)]
    assert found == [
        (1.0, 2, 2, "passed"),
        (0.5, 1, 2, "failed"),
        (0.5, 1, 2, "failed"),
        (0.0, 0, 2, "malformed"),
        (1.0, 1, 1, "passed"),
        (0.0, 0, 1, "timeout"),
        (0.0, 0, 1, "contained"),
        (1.0, 1, 1, "passed"),
        (1.0, 1, 1, "passed"),
    ]
    hard = graded(tmp_path, rows[:2], "--kind", "hard", "--force")
    assert [row["reward"] for row in hard] == [1.0, 0.0]


def test_what_cannot_be_graded_is_told_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"response": "x", "tests": SQUARES})
    for bad, words in (
        ("{", "not valid JSON"),
        (json.dumps({"tests": SQUARES}), "`response` or `program`"),
        (json.dumps({"response": "x"}), "`tests` is missing"),
        (json.dumps({"response": "x", "tests": {"answer": 3}}), "'answer'"),
        (json.dumps({"response": "x", "tests": {"inputs": ["1"], "outputs": []}}), "1 inputs and 0 outputs"),
        (json.dumps({"response": "x", "program": "x", "tests": SQUARES}), "both `response` and `program`"),
        (json.dumps({"program": 3, "tests": SQUARES}), "`response` or `program`"),
        *(
            (json.dumps({"program": "x", "tests": {"inputs": [[1]], "outputs": [1], "fn_name": name}}), told)
            for name, told in (("class", "'class' is no name"), ("a b", "'a b' is no name"), (5, "type int"))
        ),
        (json.dumps({"program": "x", "tests": {"test": "assert candidate", "entry_point": "def"}}), "'def' is no name"),
        (json.dumps({"program": "x", "tests": {"inputs": [NESTED], "outputs": [1], "fn_name": "f"}}), "nested"),
        (json.dumps({"program": "x", "tests": {"inputs": ["\ud800"], "outputs": ["1"]}}), "no valid text"),
    ):
        given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        given.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(SystemExit) as ended:
            main(["code", "--input", str(given), "--output", str(output)])
        assert ended.value.code == 1
        told = capsys.readouterr().err
        assert f"{given}:3: " in told
        assert words in told
        assert list(tmp_path.iterdir()) == [given]


def test_an_output_that_exists_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("")
    output.write_text("mine")
    with pytest.raises(SystemExit):
        main(["code", "--input", str(given), "--output", str(output)])
    assert "exists; choose another file or pass --force" in capsys.readouterr().err
    assert output.read_text() == "mine"


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_cases_of_other_projects_are_judged_as_they_say(tmp_path: Path) -> None:
    shared_sandbox()
    cases, output = DATA / "code_reward_cases" / "cases.jsonl", tmp_path / "out.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "grade.py"), "code", "--input", str(cases), "--output", str(output)]
    ran = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows
    for row in rows:
        assert (row["verdict"] == "passed") is row["expected_correct"], row
        assert (row["reward"] == 1.0) is row["expected_correct"]


@pytest.mark.parametrize("output", ["folder", "file/inside.jsonl"])
def test_an_output_that_is_no_file_is_refused_before_anything_runs(tmp_path, output, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"program": "print(1)", "tests": {"inputs": ["1"], "outputs": ["1"]}}\n')
    with pytest.raises(SystemExit):
        main(["code", "--input", str(rows), "--output", str(tmp_path / output), "--force"])
    assert "a folder" in capsys.readouterr().err


def test_half_a_character_goes_through(tmp_path: Path) -> None:
    wrong = {"inputs": [["\ud800"]], "outputs": ["\udfff"], "fn_name": "f"}
    rows = [
        {"id": "\ud800", "program": "print(5)", "tests": {"inputs": [""], "outputs": ["5"]}},
        {"id": 1, "program": "def f(x):\n    return x", "tests": {**wrong, "outputs": ["\ud800"]}},
        {"id": 2, "program": "def f(x):\n    return x", "tests": wrong},
        {"id": 3, "program": "print('\ud800')", "tests": {"inputs": [""], "outputs": ["5"]}},
        {"id": 4, "response": "```python\n# \ud800\nprint(5)\n```", "tests": {"inputs": [""], "outputs": ["\u00e9"]}},
    ]
    assert [row["reward"] for row in graded(tmp_path, rows)] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_grading_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    shared_sandbox()
    given = tmp_path / "in.jsonl"
    given.write_text(
        json.dumps({"program": "while True:\n    pass", "tests": {"inputs": [""], "outputs": ["1"]}}) + "\n"
    )
    command = [sys.executable, str(ROOT / "tools" / "grade.py"), "code", "--input", str(given), "--output"]
    command += [str(tmp_path / "out.jsonl"), "--workers", "1", "--cpu-seconds", "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as grading:
        while not list(tmp_path.glob(".out.jsonl.*")):
            assert grading.poll() is None
        grading.send_signal(signal.SIGTERM)
        assert grading.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [given]
