"""Processes of a curation: results in order, errors told, and nobody left behind."""

import os
import select
import signal
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest

from megatron_klear.curation.workers import ordered_map
from megatron_klear.data.rows import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_an_error_is_the_caller_s(workers):
    results = ordered_map(eval, ["1 + 1", "2 + 2", "3 + 3", "1 / 0", "4 + 4"], workers)
    assert [next(results) for _ in range(3)] == [("1 + 1", 2), ("2 + 2", 4), ("3 + 3", 6)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_worker_that_dies_is_told():
    with pytest.raises(DataError, match="a worker of the curation has died"):
        list(ordered_map(eval, ["__import__('os')._exit(1)"] * 3, 2))


def test_workers_end_with_the_process_that_started_them():
    program = (
        "from itertools import islice, repeat\n"
        "from megatron_klear.curation.workers import ordered_map\n"
        "results = ordered_map(eval, repeat(\"__import__('os').getpid()\"), 2)\n"
        "print(*[pid for _, pid in islice(results, 2)], flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        workers = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
    for worker in workers:
        assert select.select([worker], [], [], 20)[0], "a worker lives on"
        os.close(worker)


def test_a_caller_that_stops_early_stops_the_workers():
    results = ordered_map(eval, repeat("__import__('os').getpid()"), 2)
    _, pid = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
