"""When the rows of a sharded vocabulary are read once: what asks for it, what refuses it, and what it is given."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from emulator.build import build
from emulator.device import EmulatedDevice
from emulator.product import instead_of_the_twin
from emulator.world import World
from fused_cases import problem
from row_devices import check_results
from row_formula import take_inputs
from sharded_cases import Launched, cut, place, sharded_case, together

from megatron_klear.kernels import PolicyLossInputs, available, chunks, fused_policy_loss, mailboxes, rows
from megatron_klear.kernels.extension import KernelUnavailable
from megatron_klear.kernels.mailboxes import Mailboxes
from megatron_klear.kernels.vocab_parallel import VocabShard
from megatron_klear.rl.losses import GPPO

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
ASKED = {"KLEAR_CUDA_SHARDED_KERNEL": "one_read"}


def test_it_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mailboxes.VARIABLE, raising=False)
    assert mailboxes.mode() == "two_read"
    for name, mode in (("", "two_read"), ("two_read", "two_read"), ("one_read", "one_read"), ("auto", "auto")):
        monkeypatch.setenv(mailboxes.VARIABLE, name)
        assert mailboxes.mode() == mode
    monkeypatch.setenv(mailboxes.VARIABLE, "fast")
    with pytest.raises(
        ValueError, match="KLEAR_CUDA_SHARDED_KERNEL must be one of two_read, one_read, auto, not 'fast'"
    ):
        mailboxes.mode()


def asked_on_the_cpu(arguments: dict[str, Any]) -> tuple[str, list[float], list[str]]:
    """On every rank: what it says where the kernel is asked for, losses where two reads may run, what is logged."""
    mine = arguments | {"weight": arguments["weight"].chunk(2)[dist.get_rank()], "group": dist.group.WORLD}
    words = ""
    logged: list[str] = []
    mailboxes._log.warning = lambda text, *values: logged.append(text % values)
    os.environ |= ASKED
    try:
        fused_policy_loss(PolicyLossInputs(**mine))
    except KernelUnavailable as error:
        words = str(error)
    losses = []
    for mode in ("two_read", "auto", "auto"):
        os.environ[mailboxes.VARIABLE] = mode
        losses.append(float(fused_policy_loss(PolicyLossInputs(**mine)).loss))
    del os.environ[mailboxes.VARIABLE]
    return words, losses, logged


def one_rank_cannot(what: str) -> str:
    """On every rank: what it says where rank 1 alone cannot run the kernel, or has no symmetric memory."""
    os.environ |= ASKED
    no = f"{what} is missing" if dist.get_rank() else ""
    mailboxes._why_not = lambda *_: no if what == "the device" else ""
    mailboxes._Group._make = lambda *_: (None, no) if no else (SimpleNamespace(capacity=10), "")
    torch.cuda.is_current_stream_capturing = lambda: False
    logits = torch.zeros(2, 8)
    try:
        mailboxes.group_mailboxes(dist.group.WORLD, logits, logits)
    except KernelUnavailable as error:
        return str(error)
    finally:
        del os.environ[mailboxes.VARIABLE]
    return ""


def test_every_rank_refuses_what_one_cannot_do(ranks: Any) -> None:
    of_ranks = ranks(2, asked_on_the_cpu, problem(tokens=12, vocab=64) | {"loss": GPPO()})
    for words, losses, logged in of_ranks:
        assert words.startswith("KLEAR_CUDA_SHARDED_KERNEL=one_read asks for")
        assert "it runs on CUDA devices, not on cpu. Leave it unset" in words
        assert losses == [of_ranks[0][1][0]] * 3
        assert logged == [
            "KLEAR_CUDA_SHARDED_KERNEL=auto: logits are read twice, for it runs on CUDA devices, not on cpu"
        ]


@pytest.mark.parametrize("what", ["the device", "symmetric memory"])
def test_no_rank_goes_on_alone_where_another_cannot(ranks: Any, what: str) -> None:
    able, unable = ranks(2, one_rank_cannot, what)
    assert "1 other ranks of its group cannot run it" in able
    assert f"{what} is missing" in unable


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({}, ""),
        ({"major": 8}, "operation not supported"),
        ({"major": 12}, "operation not supported"),
        ({"most_cluster": 1}, "operation not supported"),
    ],
    ids=str,
)
def test_the_device_is_asked_before_any_rank_starts(
    emulated: EmulatedDevice, properties: dict[str, int], words: str
) -> None:
    emulated.properties(**properties)
    logits = torch.zeros(2, 75_968)
    with instead_of_the_twin(emulated):
        assert rows.sharded_refusal(logits, logits) == words
        assert rows.sharded_refusal(torch.zeros(1, 500_000), torch.zeros(1, 500_000)) == "operation not supported"


def test_code_without_clusters_is_refused() -> None:
    """As when a driver compiles the PTX of compute capability 8 for an H100: the kernel has no body."""
    with instead_of_the_twin(EmulatedDevice(build(one_read_for=800))):
        assert rows.sharded_refusal(torch.zeros(2, 64), torch.zeros(2, 64)) == "operation not supported"


def test_a_chunk_of_the_fused_loss_goes_through_the_groups_mailboxes(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches of one chunk, all ranks of which run together; what stands for the group is its mailboxes."""
    monkeypatch.setenv(mailboxes.VARIABLE, "one_read")
    monkeypatch.setattr(mailboxes, "group_mailboxes", lambda group, logits, gradient: group)
    chunk = sharded_case(605, padding=7)
    with World(emulated, 2) as world:
        for _ in range(2):
            launched, kept = [], []
            for rank, part in enumerate(cut(chunk, 2)):
                logits, gradient = place(part.logits, "in place")
                width = logits.shape[1]
                tokens, terms = take_inputs(part.arguments())
                with world.rank(rank) as peers:
                    shard = VocabShard(group=peers, rank=rank, size=2, start=rank * width, valid=width)
                    head = SimpleNamespace(shard=shard, vocab_size=part.vocab_size)
                    out = chunks._row_losses(head, logits, tokens, terms, gradient[:, :width])
                launched.append(Launched(part, out, gradient[:, :width], gradient[:, width:]))
                kept.append(tokens)
            world.run()
            check_results(cut_targets(chunk), *together(launched, 605))
    assert [peers.launches for peers in world.mailboxes] == [2, 2]


def cut_targets(chunk: Any) -> Any:
    """The chunk with some target where there is no weight, as the reference takes it."""
    return chunk.map(lambda tensor: tensor.clamp(min=0) if tensor.dtype == torch.int64 else tensor)


class Symmetric:
    """Stands in for torch's symmetric memory, of one process."""

    def __init__(self, reason: str = "") -> None:
        self.reason, self.made = reason, []

    def empty(self, size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.made.append(torch.full((size,), 77, dtype=dtype, device=device))
        return self.made[-1]

    def rendezvous(self, memory: torch.Tensor, group: Any) -> Any:
        assert not memory.any(), "a peer may write from here on"
        if self.reason:
            raise RuntimeError(self.reason)
        return SimpleNamespace(get_remote_tensor=lambda rank, shape, dtype: memory if rank == 1 else memory.clone())


class Stream:
    """A stream of CUDA's that remembers what it waits for."""

    current: Any = None

    def __init__(self) -> None:
        self.awaited: list[Any] = []
        Stream.current = self

    def wait_stream(self, other: Any) -> None:
        self.awaited.append(other)


def install(symmetric: Symmetric, emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of two ranks, this one being the second, whose devices can run the kernel."""
    monkeypatch.setenv(mailboxes.VARIABLE, "one_read")
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", symmetric)
    monkeypatch.setattr(dist, "_symmetric_memory", symmetric, raising=False)
    monkeypatch.setattr(mailboxes, "_groups", {})
    monkeypatch.setattr(mailboxes, "_why_not", lambda *_: "")
    monkeypatch.setattr(mailboxes, "core", lambda device: SimpleNamespace(module=emulated))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    return SimpleNamespace(group_name="tensor parallel")


def test_a_group_has_its_mailboxes_made_once_and_again_for_more_rows(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = install(symmetric := Symmetric(), emulated, monkeypatch)
    Stream()

    def of(rows: int, group: Any = group) -> Mailboxes | None:
        return mailboxes.group_mailboxes(group, torch.zeros(rows, 8), torch.zeros(rows, 8))

    first = of(10)
    assert (first.capacity, first.rank, len(first.addresses)) == (mailboxes.FEWEST_ROWS, 1, 2)
    assert first.addresses[1] == symmetric.made[0].data_ptr()
    assert symmetric.made[0].numel() == 2 * 2 * 32 * mailboxes.FEWEST_ROWS
    assert of(mailboxes.FEWEST_ROWS) is first
    wider = of(5000)
    assert (wider.capacity, len(symmetric.made)) == (10_000, 2)
    assert of(10) is wider
    turns = [wider.turn(emulated, 10_000) for _ in range(3)]
    assert [turn.generation for turn in turns] == [1, 2, 3]
    assert {(turn.ranks, turn.rank, turn.timeout_ns) for turn in turns} == {(2, 1, 600 * 10**9)}
    with pytest.raises(ValueError, match="hold 10000 rows, not 10001"):
        wider.turn(emulated, 10_001)
    one, other = Stream.current, Stream()
    of(10)
    assert of(10) is wider
    assert (one.awaited, other.awaited) == ([], [one]), "its launches follow each other on any stream"
    # a group made anew under the old one's name
    assert of(10, SimpleNamespace(group_name="tensor parallel")) not in (first, wider)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelUnavailable, match="cannot be part of a CUDA graph"):
        of(10)


def test_devices_that_do_not_reach_each_other_are_refused(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = install(Symmetric("no peer access"), emulated, monkeypatch)
    with pytest.raises(KernelUnavailable, match="no symmetric memory for the 2 ranks of its group: no peer access"):
        mailboxes.group_mailboxes(group, torch.zeros(1, 8), torch.zeros(1, 8))
    monkeypatch.setenv(mailboxes.VARIABLE, "auto")
    assert mailboxes.group_mailboxes(group, torch.zeros(1, 8), torch.zeros(1, 8)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": 1},
        {"ranks": 17},
        {"rank": 2},
        {"rank": -1},
        {"capacity": 2},
        {"generation": 0},
        {"timeout_ns": 0},
        {"mailboxes": [4096, 4112]},
        {"mailboxes": [4096, 0]},
        {"gradient": 0},
    ],
    ids=str,
)
def test_arguments_out_of_range_start_nothing(emulated: EmulatedDevice, change: dict[str, Any]) -> None:
    fields = {"logits": 4096, "gradient": 4096, "logits_stride": 64, "gradient_stride": 64, "rows": 3, "columns": 64}
    logits = emulated.Logits(**{**fields, "valid_columns": 64, "gradient": change.get("gradient", 4096)})
    given: dict[str, Any] = {"ticket": 4096, "capacity": 3, "timeout_ns": 1, "generation": 1, "rank": 0}
    ranks = change.get("ranks", 2)
    given |= {"mailboxes": [4096] * ranks} | {k: v for k, v in change.items() if k not in ("ranks", "gradient")}
    arguments = (
        logits,
        emulated.Tokens(),
        emulated.Coefficients(),
        emulated.Outputs(),
        emulated.Peers(**given),
    )
    assert emulated.lib.klear_cuda_sharded_rows(*map(ctypes.byref, arguments), 0, None) == -1
