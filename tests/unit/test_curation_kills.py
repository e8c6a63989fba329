"""Every verb, and a build, killed at instants all over its work and started again, gives the same files."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from curation_rows import problem, sentence, write

from megatron_klear.cli.curate import main
from megatron_klear.curation.text import problem_id

INSTANTS = 20
TEXTS = ["one", "two", "One", sentence(1, 20), sentence(1, 20) + " more", *(sentence(k, 30) for k in range(2, 30))]
BUILD = """
output = "out"
sources = [{ name = "all", files = ["../rows.jsonl"] }]

[math_rl]
sources = ["all"]
steps = [
  { kind = "deduplicate" },
  { kind = "decontaminate", against = ["../bench.jsonl"] },
  { kind = "filter-code", min_tests = 1, reward.functions = { made_up = "code" } },
  { kind = "select", total = 5, method = "random" },
]
"""
VERBS = {
    "deduplicate": (),
    "deduplicate --near": (),
    "decontaminate": ("--against", "../bench.jsonl", "--rule", "careful"),
    "select": ("--total", "5", "--method", "k_center", "--verdicts", "../verdicts.jsonl"),
    "build": (),
}


def counted(call: Callable[[int], None]) -> None:
    """Call `call` with a rising number at every line read, file removed, name given and flush to the disk."""
    at = 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            nonlocal at
            call(at)
            at += 1
            return function(*given, **named)

        return counting

    os.replace, os.fsync, os.unlink = before(os.replace), before(os.fsync), before(os.unlink)
    json.loads, json.dumps = before(json.loads), before(json.dumps)


def run(verb: str, folder: Path, stop_at: int, told: Any) -> None:
    """The command in a folder, killed at an instant; how many there are is told where it comes to its end."""
    passed = 0

    def reached(instant: int) -> None:
        nonlocal passed
        passed = instant + 1
        if instant == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    counted(reached)
    if verb == "build":
        main(["build", "--config", "../build.toml"])
    else:
        name, *flags = verb.split()
        main([name, *flags, "--input", "../rows.jsonl", "--output", "out/rows.jsonl", *VERBS[verb]])
    told.send(passed)


def in_a_fork(verb: str, folder: Path, stop_at: int = -1) -> int | None:
    """Exit well with the number of instants, or None after the kill."""
    folder.mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=run, args=(verb, folder, stop_at, theirs))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return ours.recv() if process.exitcode == 0 else None


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", VERBS)
def test_killed_and_started_again_it_gives_the_same_files(tmp_path, verb):
    if "--near" in verb:
        pytest.importorskip("rensa", reason="the extra `curation` is not installed")
    tested = {"reward_model": {"ground_truth": "assert f(1) == 1"}}
    write(tmp_path / "rows.jsonl", *(problem(text) | tested for text in TEXTS))
    write(tmp_path / "bench.jsonl", {"problem": sentence(1, 20)})
    verdicts = [{"problem": problem_id(text), "sample": k, "passed": k > 1} for text in TEXTS for k in range(3)]
    write(tmp_path / "verdicts.jsonl", *verdicts)
    (tmp_path / "build.toml").write_text(BUILD)
    instants = in_a_fork(verb, tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    assert len(whole) >= 3
    for instant in sorted(random.Random(verb).sample(range(instants), INSTANTS)):
        folder = tmp_path / str(instant)
        assert in_a_fork(verb, folder, instant) is None
        for rows in folder.rglob("rows.jsonl"):  # what has its name is whole
            assert rows.read_bytes() == whole[str(rows.relative_to(folder))]
        assert in_a_fork(verb, folder) is not None
        assert files_of(folder) == whole
