"""Runs all hostile programs in a sandbox and says what came of each and what was left behind.

As a program, `python tests/hostile_runs.py KIND` prints that as JSON: for users other than the tests' own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_klear.rewards.sandbox import Limits, Outcome, Program, open_sandbox
from tests.hostile_programs import HOSTILE

TIGHT = Limits(cpu_seconds=0.25, wall_seconds=0.8, total_seconds=15, memory_bytes=512 << 20, output_bytes=4 << 20)
INPUTS, ANSWERS = [b"1 2\n", b"20 22\n"], [b"3", b"42"]
HONEST = Program(source="a, b = map(int, input().split())\nprint(a + b)")

_WRITTEN = ("big", "0", "1", "d", "s", "f", "n", "x")
"""Files that the programs make where they are."""


def right(index: int, outcome: Outcome) -> bool:
    """Whether a program printed the sum that test `index` asks for."""
    return outcome.status == "done" and outcome.stdout.split() == [ANSWERS[index]]


def descendants(process_id: int) -> set[int]:
    """The processes below one, itself included."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = set(), [process_id]
    while todo:
        found.add(one := todo.pop())
        todo += children.get(one, [])
    return found


def alive(process_ids: Iterable[int]) -> list[int]:
    """Those of them that are there and no zombies."""
    found = []
    for one in process_ids:
        try:
            state = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(one)
    return found


def run_hostile(kind: str, names: Sequence[str] = tuple(HOSTILE), limits: Limits = TIGHT) -> dict[str, Any]:
    """What the programs ended as, who was rewarded, after whom an honest program failed, and what was left."""
    sandbox: Any = open_sandbox(kind)  # type: ignore[arg-type]
    report: dict[str, Any] = {"status": {}, "note": {}, "rewarded": [], "honest_failed": []}
    try:
        sandbox.run(HONEST, INPUTS)
        before = {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "processes": len(alive(descendants(sandbox.process_id))),
        }
        for name in names:
            outcomes = sandbox.run(Program(source=HOSTILE[name][1]), INPUTS, limits=limits, passed=right)
            report["status"][name], report["note"][name] = outcomes[0].status, outcomes[0].note
            if all(right(index, outcome) for index, outcome in enumerate(outcomes)):
                report["rewarded"].append(name)
            after = sandbox.run(HONEST, INPUTS, passed=right)
            if not all(right(index, outcome) for index, outcome in enumerate(after)):
                report["honest_failed"].append([name, after[0].status, after[0].note])
        report["starts"] = sandbox.starts
        processes = descendants(sandbox.process_id)
        report["new_descriptors"] = len(os.listdir("/proc/self/fd")) - before["descriptors"]
        report["files"] = [name for name in _WRITTEN if any(Path(where, name).exists() for where in ("/tmp", "/", "."))]
        report["new_processes"] = len(alive(processes)) - before["processes"]
    finally:
        sandbox.close()
    report["processes_after_close"] = alive(processes)
    return report


if __name__ == "__main__":
    print(json.dumps(run_hostile(sys.argv[1], sys.argv[2:] or tuple(HOSTILE))))
