"""The script that makes vLLM's environment: complete or not at all, and nothing to do the second time."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A Python whose `-m venv` makes an environment of itself, whose pip notes what it is to install, and where all imports.
PYTHON = """#!/usr/bin/env bash
[ -z "$BREAK" ] || case "$*" in *"$BREAK"*) echo "no such thing" >&2; exit 1;; esac
case "$*" in
    --version) echo Python 3.11.7;;
    *"-m venv"*)
        mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg"; echo "#!$3/bin/python" >"$3/bin/tool";;
    *"pip install"*) echo "$*" >>"$PIP_LOG";;
esac
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def make(python: Path, *arguments: str, broken: str = "") -> subprocess.CompletedProcess[str]:
    log = str(python.parent / "pip.log")
    return subprocess.run(
        ["bash", "tools/make_vllm_env.sh", *arguments],
        env={**os.environ, "KLEAR_PYTHON": str(python), "PIP_LOG": log, "BREAK": broken, "KLEAR_TORCH_INDEX": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("flags", "installs"), [(["--cpu"], ["torch==2.13.0+cpu", "-r"]), ([], ["cuda.txt"])])
def test_made_once(tmp_path: Path, python: Path, flags: list[str], installs: list[str]):
    folder = tmp_path / "env"
    done = make(python, *flags, str(folder))
    assert done.returncode == 0, done.stderr
    assert (folder / "bin" / "tool").read_text() == f"#!{folder}/bin/python\n"
    log = (tmp_path / "pip.log").read_text()
    assert all(text in line for text, line in zip(installs, log.splitlines(), strict=True))
    again = make(python, *flags, str(folder))
    assert (again.returncode, again.stderr) == (0, "")
    assert (tmp_path / "pip.log").read_text() == log


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("pip install -qq --no-deps torch", "KLEAR_TORCH_INDEX"),
        ("--no-deps -r", "vllm_requirements_cpu.txt"),
        ("api_server", "its server does not start"),
        ("-c import sys", "is not Python 3.11 or 3.12"),
    ],
)
def test_a_failure_is_told_and_leaves_nothing(tmp_path: Path, python: Path, broken: str, told: str):
    done = make(python, "--cpu", str(tmp_path / "env"), broken=broken)
    assert done.returncode == 1
    assert told in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"python", "pip.log", "env.lock"}


def test_a_failure_keeps_the_environment_that_was_there(tmp_path: Path, python: Path):
    folder = tmp_path / "env"
    assert make(python, "--cpu", str(folder)).returncode == 0
    (folder / "klear-stamp").write_text("of other requirements")
    assert make(python, "--cpu", str(folder), broken="--no-deps -r").returncode == 1
    assert (folder / "bin" / "tool").exists()
    assert make(python, "--cpu", str(folder)).returncode == 0
    assert (folder / "klear-stamp").read_text().startswith("cpu ")


def test_a_folder_of_another_kind_is_left_alone(tmp_path: Path, python: Path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "thesis.txt").write_text("years of work")
    done = make(python, "--cpu", str(tmp_path / "env"))
    assert done.returncode == 1
    assert "was not made by this script" in done.stderr
    assert (tmp_path / "env" / "thesis.txt").read_text() == "years of work"
