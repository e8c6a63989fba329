"""Measure the sandbox: tests a second beside plain Python, the computing time of a step, and that nothing leaks.

    python tools/benchmark/sandbox.py
    python tools/benchmark/sandbox.py --executions 10000 --rounds 2      a few seconds

The program adds two numbers, so that the sandbox's own cost is all there is. A worker is a process with one slot, as a
grading worker is; the baseline is `python program.py`, one process a test, started by the same workers in turn with the
slots. Computing time is that of a worker and of every process below it, from its start to its end. Targets: 10 times
the baseline's tests a second at 16 tests a program; a step of 1,024 samples of 16 tests in less than 120 s of computing
time; no descriptor and no memory gained by executions in a row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.rewards.sandbox import Outcome, Program, check_sandbox, open_sandbox
from tools.benchmark.device import cpu_name

SOURCE = "a, b = map(int, input().split())\nprint(a + b)\n"
PROGRAM = Program(source=SOURCE)
STDIN, ANSWER = b"1 2\n", b"3\n"
TARGET_RATIO, TARGET_STEP_SECONDS, MOST_GROWTH_BYTES = 10.0, 120.0, 4 << 20
Work = tuple[Callable[[], int], Callable[[], None]]
"""What runs some tests and says how many, and what is called at the end."""


def right(_: int, outcome: Outcome) -> bool:
    """Whether the program printed the sum."""
    return outcome.status == "done" and outcome.stdout == ANSWER


def plain(path: Path) -> Work:
    """One test by `python program.py`."""

    def work() -> int:
        ran = subprocess.run([sys.executable, str(path)], input=STDIN, capture_output=True, check=True)
        assert ran.stdout == ANSWER
        return 1

    return work, lambda: None


def in_slot(kind: Any, tests: int, *, shared: bool) -> Work:
    """One program on all its tests, in a process that they share or in one each."""
    sandbox = open_sandbox(kind)

    def work() -> int:
        outcomes = sandbox.run(PROGRAM, [STDIN] * tests, passed=right if shared else None)
        assert all(right(0, outcome) for outcome in outcomes), outcomes
        return tests

    return work, sandbox.close


def computing_seconds() -> float:
    """Of this process and of all below it that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(make: Callable[[], Work], workers: int, *, seconds: float = 0.0, programs: int = 0) -> dict[str, float]:
    """Tests, wall and computing seconds of workers that go on for `seconds`, or over `programs` in all."""
    context = multiprocessing.get_context("fork")
    shares = [programs // workers + (number < programs % workers) for number in range(workers)]
    pipes, processes = [], []
    for share in shares:
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(make, theirs, seconds, share))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    start = time.perf_counter()
    counts = [pipe.recv() for pipe in pipes]
    wall = time.perf_counter() - start
    computing = sum(pipe.recv() for pipe in pipes)
    for process in processes:
        process.join()
    return {"tests": sum(counts), "wall_seconds": wall, "computing_seconds": computing}


def _worker(make: Callable[[], Work], pipe: Connection, seconds: float, programs: int) -> None:
    before = computing_seconds()
    (work, close), count, end = make(), 0, time.perf_counter() + seconds
    while programs > 0 or time.perf_counter() < end:
        count += work()
        programs -= 1
    pipe.send(count)
    close()
    pipe.send(computing_seconds() - before)


def throughput(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tests a second of each way, over rounds in which they take turns."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(SOURCE)
        tests, kind = arguments.tests, arguments.kind
        ways: dict[str, Callable[[], Work]] = {
            "python program.py": lambda: plain(path),
            f"slot, {tests} tests in one process": lambda: in_slot(kind, tests, shared=True),
            f"slot, {tests} tests, a process each": lambda: in_slot(kind, tests, shared=False),
            "slot, one test a program": lambda: in_slot(kind, 1, shared=True),
        }
        totals = {name: {"tests": 0.0, "wall_seconds": 0.0, "computing_seconds": 0.0} for name in ways}
        for _ in range(arguments.rounds):
            for name, make in ways.items():
                measured = measure(make, arguments.workers, seconds=arguments.seconds)
                totals[name] = {key: totals[name][key] + value for key, value in measured.items()}
    base = totals["python program.py"]
    for name, total in totals.items():
        total["tests_per_second"] = total["tests"] / total["wall_seconds"]
        total["computing_ms_per_test"] = 1000 * total["computing_seconds"] / total["tests"]
        total["ratio"] = total["tests_per_second"] * base["wall_seconds"] / base["tests"]
        print(
            f"{name:34} {total['tests_per_second']:8.1f} tests/s  x {total['ratio']:5.1f}"
            f"   {total['computing_ms_per_test']:6.2f} ms of computing a test"
        )
    return totals


def leaks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Descriptors and memory of this process, and memory of the zygote, early and late in a row of executions."""
    sandbox: Any = open_sandbox(arguments.kind)
    programs = -(-arguments.executions // arguments.tests)
    early, start = {}, time.perf_counter()
    for number in range(programs):
        outcomes = sandbox.run(PROGRAM, [STDIN] * arguments.tests, passed=right)
        assert all(right(0, outcome) for outcome in outcomes), outcomes
        if number == programs // 20:
            early = _held(sandbox.process_id)
    late = _held(sandbox.process_id)
    sandbox.close()
    result = {
        "executions": programs * arguments.tests,
        "wall_seconds": time.perf_counter() - start,
        "starts": sandbox.starts,
        "early": early,
        "late": late,
    }
    print(f"{result['executions']} executions through one slot in {result['wall_seconds']:.0f} s: {early} -> {late}")
    return result


def _held(process_id: int) -> dict[str, int]:
    """What this process and the zygote hold; the zygote is bubblewrap's child, or the slot's process itself."""
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    zygote = int(children[0]) if children else process_id
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "outside_bytes": _resident(os.getpid()),
        "zygote_bytes": _resident(zygote),
        "zygote_descriptors": len(os.listdir(f"/proc/{zygote}/fd")),
        "processes": 1 + len(children),
    }


def _resident(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * resource.getpagesize()


def missed(report: dict[str, Any]) -> list[str]:
    """The targets that were not met, in words."""
    found = []
    shared = report["throughput"][f"slot, {report['tests']} tests in one process"]
    if shared["ratio"] < TARGET_RATIO:
        found.append(f"{shared['ratio']:.1f} times plain Python, not {TARGET_RATIO:.0f}")
    if report["step"]["computing_seconds"] >= TARGET_STEP_SECONDS:
        found.append(f"a step takes {report['step']['computing_seconds']:.0f} s of computing")
    early, late = report["leaks"]["early"], report["leaks"]["late"]
    for name in early:
        if late[name] - early[name] > (MOST_GROWTH_BYTES if name.endswith("bytes") else 0):
            found.append(f"{name} grew from {early[name]} to {late[name]}")
    return found


def main() -> int:
    """Run, print, write JSON; exit code 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("bubblewrap", "landlock"), default="bubblewrap")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in a round")
    parser.add_argument("--tests", type=int, default=16, help="of a program")
    parser.add_argument("--samples", type=int, default=1024, help="of a step")
    parser.add_argument("--executions", type=int, default=100_000, help="in a row, to see a leak")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sandbox.json")
    arguments = parser.parse_args()
    found = check_sandbox(arguments.kind)
    print(f"{found}; {arguments.workers} workers; load {os.getloadavg()[0]:.1f}", flush=True)
    report: dict[str, Any] = {
        "benchmark": "sandbox",
        "device": f"{cpu_name()}, {arguments.workers} used",
        "sandbox": found,
        "python": sys.version.split()[0],
        "load_before": os.getloadavg()[0],
        "tests": arguments.tests,
        "throughput": throughput(arguments),
    }
    step = measure(
        lambda: in_slot(arguments.kind, arguments.tests, shared=True), arguments.workers, programs=arguments.samples
    )
    print(
        f"a step of {arguments.samples} samples of {arguments.tests} tests: {step['computing_seconds']:.1f} s of "
        f"computing, {step['wall_seconds']:.1f} s by the clock",
        flush=True,
    )
    report |= {"step": {"samples": arguments.samples, **step}, "leaks": leaks(arguments)}
    failed = missed(report)
    report["missed"] = failed
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print("missed: " + "; ".join(failed) if failed else "all targets met")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
