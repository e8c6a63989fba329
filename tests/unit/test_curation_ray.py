"""Curation on a real local Ray: the same bytes as in this process, and nobody left behind."""

import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import psutil
import pytest
from curation_rows import problem, sentence, write

from megatron_klear.cli.curate import main
from megatron_klear.curation import build
from megatron_klear.curation.ray_engine import RayEngine, open_engine
from megatron_klear.data.rows import DataError

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("ray", "rensa"))), reason="the extras `ray` and `curation` are not installed"
)
BUILD = """
output = "out"
sources = [{ name = "made", files = ["../rows.jsonl"] }]
[math_rl]
sources = ["made"]
steps = [
  { kind = "deduplicate", near = true },
  { kind = "decontaminate", against = ["../bench.jsonl"], rule = "careful" },
  { kind = "select", total = 300, method = "k_center" },
]
"""


@pytest.fixture(scope="module")
def engine():
    """A Ray with two workers."""
    with open_engine("ray", 2) as engine:
        yield engine
    here = psutil.Process()
    assert not [child for child in here.children(recursive=True) if "ray" in " ".join(child.cmdline())]


def test_a_build_on_ray_has_the_bytes_of_one_in_this_process(tmp_path, monkeypatch, engine):
    opened = {"ray": engine, "local": None}  # one Ray for all tests
    monkeypatch.setattr(build, "open_engine", lambda name, *_: nullcontext(opened[name]))
    write(tmp_path / "rows.jsonl", *(problem(sentence(k % 1500, 30)) for k in range(1600)), b"{")
    write(tmp_path / "bench.jsonl", {"problem": sentence(7, 30)})
    (tmp_path / "build.toml").write_text(BUILD)
    for name in opened:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        main(["build", "--config", "../build.toml", "--engine", name, "--workers", "2"])
    files = [path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*") if path.is_file()]
    assert len(files) == 23
    for file in files:
        assert (tmp_path / "ray" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()


def test_a_ray_is_joined_and_left_as_it_is(tmp_path, engine):
    """By a process of its own: one process is of one Ray."""
    list(engine.map(eval, ["1"]))  # it is started
    write(tmp_path / "rows.jsonl", *(problem(sentence(k % 50, 30)) for k in range(60)))
    write(tmp_path / "bench.jsonl", {"problem": sentence(7, 30)})
    common = ["decontaminate", "--input", str(tmp_path / "rows.jsonl"), "--against", str(tmp_path / "bench.jsonl")]
    main([*common, "--output", str(tmp_path / "local" / "rows.jsonl")])
    joined = [*common, "--output", str(tmp_path / "joined" / "rows.jsonl"), "--engine", "ray"]
    command = [sys.executable, "-m", "megatron_klear.cli", "curate", *joined, "--ray-address", engine._node.address]
    subprocess.run(command, check=True, timeout=120)
    for file in (tmp_path / "local").iterdir():
        assert (tmp_path / "joined" / file.name).read_bytes() == file.read_bytes()
    assert list(engine.map(eval, ["1 + 1"])) == [("1 + 1", 2)]


def test_an_address_without_a_ray_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["deduplicate", "--input", "r.jsonl", "--output", "o/r.jsonl", "--ray-address", "auto"])
    assert "--ray-address goes with --engine ray" in capsys.readouterr().err


def test_results_come_in_order_and_an_error_is_the_caller_s(engine: RayEngine):
    results = engine.map(eval, ["1 + 1", "2 + 2", "3 + 3", "1 / 0", "4 + 4"])
    assert [next(results) for _ in range(3)] == [("1 + 1", 2), ("2 + 2", 4), ("3 + 3", 6)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_worker_that_dies_again_and_again_is_told(engine: RayEngine):
    with pytest.raises(DataError, match="Ray has lost a worker of the curation"):
        list(engine.map(eval, ["__import__('os')._exit(1)"]))


@pytest.mark.parametrize("verb", ["filter-code", "filter-pass-rate", "distill"])
def test_a_verb_that_has_processes_of_its_own_refuses(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--input", "rows.jsonl", "--output", "out/rows.jsonl", "--engine", "ray"])
    assert f"--engine ray would do nothing for {verb}" in capsys.readouterr().err
