"""The rank pool: results in order, every failure told, nothing left running."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RankFailure


class _Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def _sum_of_ranks(offset: int) -> tuple[int, int, str, float]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), os.environ["RANK"], value.item()


def _raise_on(rank: int, error: type[Exception], *args: str) -> int:
    if dist.get_rank() == rank:
        raise error(*args)
    dist.barrier()
    return 0


def _raise_alone(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("no")


def _raise_everywhere() -> None:
    dist.barrier()  # none may be gone while another still meets the rest
    raise ValueError(f"rank {dist.get_rank()} says no")


def _kill_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def _leave_child_behind() -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def _initialise_megatron(tensor: int) -> tuple[int, int]:
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, create_gloo_process_groups=False)
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_world_size()


def _pid() -> int:
    return os.getpid()


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_results_come_in_rank_order(ranks: Pool, world_size: int) -> None:
    expected = world_size * 10.0 + sum(range(world_size))
    assert ranks(world_size, _sum_of_ranks, 10) == [(r, world_size, str(r), expected) for r in range(world_size)]


def test_case_sees_no_state_of_the_case_before(ranks: Pool) -> None:
    assert ranks(4, _initialise_megatron, 2) == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert ranks(4, _initialise_megatron, 4) == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_first_exception_is_raised_with_the_rank_named(ranks: Pool) -> None:
    with pytest.raises(KeyError, match="missing") as info:
        ranks(3, _raise_on, 1, KeyError, "missing")
    assert any("rank 1 raised" in note and "_raise_on" in note for note in info.value.__notes__)


def test_every_failing_rank_is_told(ranks: Pool) -> None:
    with pytest.raises(ValueError, match="says no") as info:
        ranks(3, _raise_everywhere)
    notes = "\n".join(info.value.__notes__)
    assert all(f"rank {rank} says no" in notes for rank in range(3))


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_failing_rank_is_blamed(ranks: Pool, rank: int) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="no") as info:
        ranks(2, _raise_alone, rank)
    assert [note.splitlines()[0] for note in info.value.__notes__] == [f"--- rank {rank} raised"]
    assert time.monotonic() - start < 2, "the other rank was waited for"


def test_exception_that_cannot_travel_keeps_its_text(ranks: Pool) -> None:
    with pytest.raises(RankFailure, match="_Unpicklable: one two"):
        ranks(2, _raise_on, 0, _Unpicklable, "one", "two")


def test_killed_rank_is_reported_and_the_pool_goes_on(ranks: Pool) -> None:
    with pytest.raises((RankFailure, RuntimeError)) as info:
        ranks(2, _kill_on, 1)
    notes = "\n".join(info.value.__notes__)
    assert "rank 1 died of SIGKILL" in notes
    assert "last words" in notes
    assert len(ranks(2, _pid)) == 2


def test_hang_is_ended_with_the_stack_of_the_hanging_rank(ranks: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="hung for 1 seconds") as info:
        ranks(2, _sleep_on, 1, timeout_seconds=1)
    assert time.monotonic() - start < 10
    (note,) = info.value.__notes__
    assert note.startswith("--- rank 1 hung")
    assert "_sleep_on" in note
    assert len(ranks(2, _pid)) == 2


def test_processes_started_by_a_case_end_with_it(ranks: Pool) -> None:
    for pid in ranks(2, _leave_child_behind):
        _wait_until_gone(pid)


def test_world_size_is_checked(ranks: Pool) -> None:
    with pytest.raises(ValueError, match="1 to 8 ranks"):
        ranks(9, _pid)


def test_nothing_outlives_a_killed_session(tmp_path: Path) -> None:
    """A session killed outright while ranks run takes its server and its ranks along."""
    (tmp_path / "victim.py").write_text(
        textwrap.dedent(
            """
            import os, sys, time
            from pathlib import Path

            def wait(folder):
                Path(folder, f"pid.{os.environ['RANK']}").write_text(f"{os.getpid()} {os.getppid()}")
                time.sleep(1000)
            """
        )
    )
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import victim; from pool import Pool; "
    program += f"Pool()(2, victim.wait, {str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    session = subprocess.Popen([sys.executable, "-c", program], env=environment)
    files = [tmp_path / f"pid.{rank}" for rank in range(2)]
    deadline = time.monotonic() + 120
    while not all(file.exists() and len(file.read_text().split()) == 2 for file in files):
        assert session.poll() is None, "the session ended before its ranks ran"
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    pids = {int(word) for file in files for word in file.read_text().split()}
    session.kill()
    session.wait()
    for pid in pids:
        _wait_until_gone(pid)


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.02)
