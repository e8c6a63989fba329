"""Data is hashed and tokenized once a job, or once a node, whatever the file system's locks."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import Pool

from megatron_klear.config.base import DataConfig, ParallelConfig
from megatron_klear.data import store as store_module
from megatron_klear.data.arithmetic import arithmetic_rows
from megatron_klear.distributed import exchange as ranks_module
from megatron_klear.distributed.exchange import patiently
from megatron_klear.mcore.topology import process_group
from megatron_klear.train.stores import open_for_all

TINY = Path(__file__).resolve().parents[2] / "examples/tiny_tokenizer"


@contextlib.contextmanager
def no_locks(path: Path) -> Iterator[bool]:
    """As on a file system without them."""
    yield False


def opened(folder: Path, caches: list[str], local_ranks: list[int]) -> tuple[int, int, int]:
    """Files that this rank hashed, stores that it built, samples that it sees."""
    hashed, built = [], []
    digest, build = store_module.file_digest, store_module.build
    with process_group(ParallelConfig()), pytest.MonkeyPatch.context() as patch:
        import torch.distributed as dist

        rank = dist.get_rank()
        patch.setenv("LOCAL_RANK", str(local_ranks[rank]))
        patch.setattr(store_module, "_lock", no_locks)
        patch.setattr(store_module, "file_digest", lambda path, memo: (hashed.append(path), digest(path, memo))[1])
        patch.setattr(store_module, "build", lambda *args: (built.append(args), build(*args))[1])
        config = DataConfig(train=(str(folder / "rows.jsonl"),), cache=folder / caches[rank], workers=1)
        found = open_for_all(config, TINY)
        return len(hashed), len(built), len(found)


@pytest.mark.parametrize(
    ("caches", "local_ranks", "builders"),
    [
        (["shared"] * 4, [0, 1, 0, 1], [1, 0, 0, 0]),
        (["one", "one", "two", "two"], [0, 1, 0, 1], [1, 0, 1, 0]),
    ],
    ids=["a shared disk", "a disk a node"],
)
def test_one_rank_reads_the_data(
    tmp_path: Path, ranks: Pool, caches: list[str], local_ranks: list[int], builders: list[int]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in arithmetic_rows(20)))
    found = ranks(4, opened, tmp_path, caches, local_ranks)
    assert [built for _, built, _ in found] == builders
    assert [hashed > 0 for hashed, _, _ in found] == [bool(built) for built in builders]
    assert [samples for _, _, samples in found] == [20] * 4


def slow_or_failing(failing: int) -> str:
    """Work that outlasts many beats on one rank, and fails on it."""
    import torch.distributed as dist

    with process_group(ParallelConfig()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "BEAT_SECONDS", 0.01)
        beats: list[int] = []
        reduce = dist.all_reduce
        patch.setattr(ranks_module.dist, "all_reduce", lambda *a, **k: (beats.append(1), reduce(*a, **k))[1])

        def work() -> str:
            if dist.get_rank() == failing:
                while len(beats) < 5:
                    pass
                raise OSError("no space")
            return "done"

        try:
            return patiently(work)
        except (OSError, RuntimeError) as error:
            return str(error)


def test_all_ranks_hear_of_slow_work_that_fails(ranks: Pool) -> None:
    assert ranks(2, slow_or_failing, 1) == ["rank 1 failed: OSError('no space')", "no space"]
    assert ranks(2, slow_or_failing, -1) == ["done", "done"]
