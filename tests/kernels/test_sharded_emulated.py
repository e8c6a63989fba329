"""The kernel that reads a sharded vocabulary once, on emulated devices whose launches run together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from emulator.device import SCHEDULES, CallError, EmulatedDevice, Schedule
from emulator.world import World
from row_devices import check_results, emulated_device
from row_formula import Rows, take_inputs
from sharded_cases import NAMES, cut, launch, place, sharded_case, together

from megatron_klear.kernels import available, rows

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RANKS = pytest.mark.parametrize("ranks", [2, 4])
MakeWorld = Callable[..., World]


@pytest.fixture
def world(emulated: EmulatedDevice) -> MakeWorld:
    """Makes some devices, each new."""
    return lambda ranks, **more: World(emulated, ranks, **more)


def checked(chunk: Rows) -> Rows:
    """The chunk as the reference takes it: rows without weight have some target."""
    return replace(chunk, targets=chunk.targets.clamp(min=0))


@RANKS
@DTYPES
@pytest.mark.parametrize("padding", [3, 400], ids=["padded", "idle shard"])
def test_every_order_gives_the_same_bits_and_what_float64_gives(
    world: MakeWorld, ranks: int, dtype: torch.dtype, padding: int
) -> None:
    """Five rows, of which two at a time run on a device; of "idle shard" the last shard is padding and nothing else."""
    chunk = sharded_case(1001, dtype, padding=padding if ranks == 4 else padding + 110)
    first = None
    with world(ranks) as devices:
        for schedule in SCHEDULES.values():
            launched = launch(devices, chunk)
            devices.run(schedule)
            out, gradient = together(launched, 1001)
            check_results(checked(chunk), out, gradient)
            now = [getattr(out, name) for name in NAMES] + [gradient]
            first = first or now
            assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
        assert {item.file for item in devices.launches} == {"cuda_sharded.cu"}


@DTYPES
def test_the_merge_and_the_finish_are_those_of_two_phases_bit_by_bit(
    world: MakeWorld, emulated: EmulatedDevice, dtype: torch.dtype
) -> None:
    """From the statistics that the kernel posted. These add up a shard in another order than `stats_rows`."""
    chunk = sharded_case(2051, dtype, padding=20)
    with world(4) as devices:
        launched = launch(devices, chunk)
        devices.run()
        posted = devices.posted(1, 5)
    trained = chunk.policy_weights != 0
    merged = rows.combine_stats(posted)
    with emulated_device(emulated).active():
        for rank, (part, one) in enumerate(zip(cut(chunk, 4), launched, strict=True)):
            logits, gradient = place(part.logits, "in place")
            width = logits.shape[1]
            arguments = part.arguments()
            tokens, terms = take_inputs(arguments)
            own = rows.stats_rows(logits, tokens, vocab_start=rank * width, **arguments)
            torch.testing.assert_close(posted[rank][:, trained], own[:, trained], rtol=2e-6, atol=2e-5)
            assert torch.equal(posted[rank][0, trained], own[0, trained]), "a maximum knows no order"
            out = rows.finish_rows(logits, merged, tokens, terms, vocab_start=rank * width, **arguments)
            assert torch.equal(gradient[:, :width], one.gradient)
            assert all(torch.equal(getattr(out, name), getattr(one.out, name)) for name in NAMES)


@pytest.mark.parametrize("placement", ["narrow", "apart"])
def test_gradients_narrowed_in_place_and_apart(world: MakeWorld, placement: str) -> None:
    chunk = sharded_case(2030, padding=9)
    with world(2) as devices:
        launched = launch(devices, chunk, placement)
        devices.run(SCHEDULES["preempted"])
    out, gradient = together(launched, 2030)
    check_results(checked(chunk), out, gradient)


@pytest.mark.parametrize(("columns", "cluster"), [(60_000, 1), (70_001, 2), (140_001, 4)])
def test_clusters_of_blocks(world: MakeWorld, columns: int, cluster: int) -> None:
    """Three blocks of the smaller clusters fit on a multiprocessor."""
    chunk = sharded_case(columns, torch.bfloat16 if cluster == 1 else torch.float32, count=3, padding=5)
    with world(2) as devices:
        for schedule in (SCHEDULES["backward"], SCHEDULES["random"]):
            launched = launch(devices, chunk)
            devices.run(schedule)
            check_results(checked(chunk), *together(launched, columns))
        assert {item.cluster for item in devices.launches} == {cluster}
        assert min(item.resident for item in devices.launches) >= 3


@RANKS
def test_launches_follow_each_other_through_the_same_mailboxes(world: MakeWorld, ranks: int) -> None:
    """Devices come to a launch when others are still in the one before; some launches have no row with a weight."""
    chunks = [sharded_case(101 + i, count=1 + i % 4, padding=2, seed=i) for i in range(7)]
    chunks[3] = replace(chunks[3], policy_weights=torch.zeros(4))
    for number, schedule in enumerate(SCHEDULES.values()):
        with world(ranks, resident=1 + number % 3, capacity=4) as devices:
            launched = [launch(devices, chunk) for chunk in chunks]
            devices.run(schedule)
            again = [launch(devices, chunk) for chunk in chunks]
            devices.run()
            for chunk, first, second in zip(chunks, launched, again, strict=True):
                out, gradient = together(first, chunk.logits.shape[1])
                check_results(checked(chunk), out, gradient)
                assert torch.equal(together(second, chunk.logits.shape[1])[1], gradient)


def test_rows_that_mean_nothing(world: MakeWorld) -> None:
    """A NaN on one shard, an infinity on another, no finite logit, an absent target: as of one device."""
    chunk = sharded_case(1000, count=7)
    logits, targets = chunk.logits.clone(), chunk.targets.clone()
    logits[1, 3], logits[2, 900], logits[3] = float("nan"), float("inf"), float("-inf")
    logits[4, 600], targets[4], targets[6] = float("-inf"), 600, 5000
    chunk = replace(chunk, logits=logits, targets=targets)
    with world(2) as devices:
        launched = launch(devices, chunk)
        devices.run(SCHEDULES["random"])
    out, gradient = together(launched, 1000)
    whole, wanted = logits.clone(), chunk.arguments()
    tokens, terms = take_inputs(wanted)
    twin = rows.policy_loss_rows(whole, tokens, terms, **wanted)
    assert out.status.tolist() == twin.status.tolist() == [0, 4, 4, 4, 2, 0, 1]
    for name in NAMES:
        torch.testing.assert_close(getattr(out, name), getattr(twin, name), atol=2e-5, rtol=4e-5, equal_nan=True)
    assert torch.equal(gradient.isnan(), whole.isnan())


@RANKS
def test_a_rank_that_never_launches_ends_the_others_by_an_error(world: MakeWorld, ranks: int) -> None:
    with world(ranks) as devices:
        launched = launch(devices, sharded_case(301), absent=(1,))
        with pytest.raises(CallError) as raised:
            devices.run(SCHEDULES["preempted"])
        assert raised.value.code == 719
    assert len(launched) == ranks - 1


def test_a_rank_that_is_a_launch_behind_ends_in_an_error_too(world: MakeWorld) -> None:
    with world(2) as devices:
        first, second = sharded_case(301), sharded_case(301, seed=1)
        kept = [launch(devices, first), launch(devices, second, absent=(0,))]
        with pytest.raises(CallError) as raised:
            devices.run()
        assert raised.value.code == 719
    assert kept


@pytest.mark.slow
@RANKS
@DTYPES
def test_many_cases(world: MakeWorld, ranks: int, dtype: torch.dtype) -> None:
    """Widths around units and pieces, one to four clusters at a time, several launches, orders of other seeds."""
    for seed, columns in enumerate((5, 8, 31, 64, 97, 1031, 3072, 4099, 12_289, 40_000)):
        count = 2 + seed % 6
        chunk = sharded_case(columns, dtype, count=count, padding=min(columns - 1, 7 * seed), seed=seed)
        for name, schedule in SCHEDULES.items():
            with world(ranks, resident=1 + seed % 4, capacity=8) as devices:
                kept = [launch(devices, chunk, placement) for placement in ("in place", "apart", "in place")]
                devices.run(Schedule(**{**_fields(schedule), "seed": seed + 1}))
                for one in kept:
                    try:
                        check_results(checked(chunk), *together(one, columns))
                    except AssertionError as error:
                        error.add_note(f"{columns} columns, {name}")
                        raise


def _fields(schedule: Schedule) -> dict[str, int]:
    return {name: getattr(schedule, name) for name in ("order", "copies", "preempt", "exp2_error")}
