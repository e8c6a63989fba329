"""Activations that wait on the host: the numbers of a step that keeps them, whatever the streams do meanwhile.

There is no card here: streams are emulated at their worst, whose copies are made as late as somebody waits for them,
out of tensors that may be gone by then and into memory that holds nan until then.
"""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_memory import LAYOUTS, SHAPE, TOKENS, peak_and_plan
from torch import Tensor

from megatron_klear.config.base import DataConfig, ModelConfig, OffloadConfig, ParallelConfig, SFTConfig
from megatron_klear.config.checks import activation_offload_problems
from megatron_klear.data.pack import pack
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore import engine as engine_module
from megatron_klear.mcore.activation_offload import ActivationOffload
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.types import Sample
from megatron_klear.verify.layouts import Layout, layouts_named

NAMES = ("one process", "full recompute", "selective recompute", "TP2 SP", "PP2", "PP2 VPP2", "CP2")
LENGTHS = ((40, 24), (64,), (33, 31), (8,), (50,))
"""Of the sequences of each row: rows differ in number and length from step to step."""


class Late:
    """A stream whose work is done when somebody waits for it, and no sooner."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0
        self.deaf_to: Late | None = None

    def record_event(self) -> tuple["Late", int]:
        return self, len(self.queue)

    def wait_event(self, event: tuple["Late", int]) -> None:
        if event[0] is not self.deaf_to:
            self.queue.append(lambda: event[0].run(event[1]))

    def wait_stream(self, other: "Late") -> None:
        self.wait_event(other.record_event())

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.queue[self.done - 1]()
            self.queue[self.done - 1] = lambda: None


class Now(Late):
    """The stream that computes: here it has always done everything."""

    def wait_event(self, event: tuple[Late, int]) -> None:
        super().wait_event(event)
        self.run(len(self.queue))


def spoil(memory: Tensor) -> Tensor:
    """Memory that nobody has written yet, or that is another's by now: what is read of it is noticed."""
    return memory.fill_(float("nan") if memory.is_floating_point() else -1)


class LateOffload(ActivationOffload):
    """With emulated streams."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._to_host, self._to_device = Late(), Late()
        self.copied = 0

    def _copy(self, to: Tensor, source: Tensor, stream: Late) -> None:
        self.copied += to.nbytes
        target, made_of = weakref.ref(to), weakref.ref(source)

        def copy() -> None:
            there, source = target(), made_of()
            if there is not None:
                spoil(there) if source is None else there.copy_(source)

        stream.queue.append(copy)

    def _host(self, tensor: Tensor) -> Tensor:
        # Not torch's memory, which is counted as the card's.
        return spoil(torch.from_numpy(np.empty(tensor.nbytes, dtype=np.uint8)).view(tensor.dtype).view(tensor.shape))

    def _room(self, host: Tensor) -> Tensor:
        return spoil(torch.empty_like(host))


def settings(folder: Path, layout: Layout, offload: bool, **changes: Any) -> SFTConfig:
    config = SFTConfig(
        output=folder / "run",
        model=ModelConfig(path=folder / "model", weights="random", dtype="fp32"),
        data=DataConfig(train=("unused",), max_length=64, tokens_per_microbatch=64),
        parallel=ParallelConfig(device="cpu"),
        offload=OffloadConfig(activations=offload, smallest_bytes=1024, **changes),
    )
    return layout.apply(config)


def rows_of(step: int, lengths: tuple[tuple[int, ...], ...]) -> list[Any]:
    random = np.random.default_rng(step)
    count = sum(map(sum, lengths))
    samples = [
        [Sample(tokens=random.integers(0, 500, n).astype(np.int32), trained=np.ones(n, dtype=np.bool_)) for n in of_row]
        for of_row in lengths
    ]
    return [pack(of_row, [1.0 / count] * len(of_row)) for of_row in samples]


def losses(folder: Path, layout: Layout, offload: bool, deaf: str = "") -> tuple[list[float], int]:
    """Losses and norms of steps of differing rows, and bytes that were copied."""
    config = settings(folder, layout, offload, window=3)
    found: list[float] = []
    compute = Now()
    with world(config.parallel, config.seed) as topology, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "ActivationOffload", LateOffload)
        patch.setattr(torch.cuda, "current_stream", lambda: compute)
        engine = Engine(config, topology)
        if deaf:
            compute.deaf_to = getattr(engine._offload, deaf)
        for step, lengths in enumerate((LENGTHS[:2], LENGTHS, LENGTHS[3:])):
            stats = engine.train_step(rows_of(step, lengths), NLL())
            found += [stats.loss, stats.grad_norm]
        engine.close()
        return found, engine._offload.copied if offload else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("offload")
    write_tiny_model(place / "model", "qwen3", TinyShape(), weights=False)
    return place


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_that_keep_everything(folder: Path, ranks: Any, name: str) -> None:
    (layout,) = layouts_named([name])
    kept, away = (ranks(layout.processes, losses, folder, layout, offload) for offload in (False, True))
    for (expected, _), (found, copied) in zip(kept, away, strict=True):
        assert found == expected
        assert copied > 100_000


def test_experts_over_two_ranks_are_those_that_keep_everything(tmp_path: Path, ranks: Any) -> None:
    write_tiny_model(tmp_path / "model", "qwen3_moe", TinyShape(), weights=False)
    (layout,) = layouts_named(["EP2"])
    kept, away = (ranks(layout.processes, losses, tmp_path, layout, offload) for offload in (False, True))
    assert [found for found, _ in away] == [found for found, _ in kept]
    assert all(copied > 100_000 for _, copied in away)


@pytest.mark.parametrize("deaf", ["_to_host", "_to_device"])
def test_a_step_that_does_not_wait_for_a_stream_is_noticed(folder: Path, ranks: Any, deaf: str) -> None:
    (layout,) = layouts_named(["one process"])
    ((found, _),) = ranks(1, losses, folder, layout, True, deaf)
    assert np.isnan(found).any()


def measured_and_planned(folder: Path, layout: Layout) -> tuple[int, int]:
    """The peak of a step on this rank's card, state included, and what the plan says."""
    config = settings(folder, layout, True).model_copy(
        update={"data": DataConfig(train=("unused",), max_length=TOKENS, tokens_per_microbatch=TOKENS)}
    )
    compute = Now()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "ActivationOffload", LateOffload)
        patch.setattr(torch.cuda, "current_stream", lambda: compute)
        return peak_and_plan(config)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("offload_memory")
    write_tiny_model(place / "model", "qwen3", SHAPE, weights=False)
    return place


@pytest.mark.parametrize("name", ["one process", "full recompute", "PP2"])
def test_plan_is_within_a_tenth_of_the_measured_peak(larger: Path, ranks: Any, name: str) -> None:
    assert name in LAYOUTS
    (layout,) = layouts_named([name])
    for rank, (measured, planned) in enumerate(ranks(layout.processes, measured_and_planned, larger, layout)):
        assert planned == pytest.approx(measured, rel=0.1), f"rank {rank}: {planned / measured:.3f} of the peak"


def test_settings_that_win_nothing_are_refused(folder: Path) -> None:
    config = settings(folder, Layout(name="x", recompute="selective", recompute_modules=("layernorm",)), True)
    told = " ".join(activation_offload_problems(config))
    assert "parallel.device is cpu" in told
    assert "recompute.modules" in told
    card = ParallelConfig(device="cuda")
    fine = settings(folder, layouts_named(["full recompute"])[0], True).model_copy(update={"parallel": card})
    assert activation_offload_problems(fine) == []


class TwoReadings(torch.autograd.Function):
    """Saves numbers, and the same memory read as whole numbers."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(numbers, numbers.view(torch.int32))
        return numbers * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        numbers, bits = ctx.saved_tensors
        assert bits.dtype == torch.int32
        assert torch.equal(bits, numbers.view(torch.int32))
        return gradient * numbers


def test_memory_that_is_saved_in_two_types_comes_back_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Now()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    settings = OffloadConfig(activations=True, smallest_bytes=1, window=1)
    offload = LateOffload(settings, [], torch.device("cpu"))
    numbers = torch.arange(64.0, requires_grad=True)
    with offload.row():
        out: Tensor = TwoReadings.apply(numbers + 1)
    out.sum().backward()
    assert torch.equal(numbers.grad, torch.arange(64.0) + 1)


class Watched(LateOffload):
    """Notes of what is fetched whether its copy was made when its memory was let go of."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made: list[bool] = []

    def _copy(self, to: Tensor, source: Tensor, stream: Late) -> None:
        super()._copy(to, source, stream)
        if stream is self._to_device:
            weakref.finalize(to, self._note, len(stream.queue))

    def _note(self, place: int) -> None:
        self.made.append(self._to_device.done >= place)


def test_memory_is_not_given_out_again_before_the_copy_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Now()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    offload = Watched(OffloadConfig(activations=True, smallest_bytes=1, window=1), [], torch.device("cpu"))
    numbers = torch.ones(64, requires_grad=True)
    with offload.row():
        unread = (numbers * 2).exp().sin()  # saved, and nothing that the loss reads
        out = (numbers * 3).exp().cos().sum() + (numbers * 5).exp().sum()
    out.backward()
    del unread, out
    assert len(offload.made) >= 2
    assert all(offload.made)
