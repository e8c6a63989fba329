"""The fused policy loss with CUDA's row kernels under it, on the emulated device: hidden states to gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator.build import build
from emulator.device import SCHEDULES, EmulatedDevice
from emulator.product import instead_of_the_twin
from fused_cases import FAMILY, OWN, differentiate, double, errors, problem, relative, same_bits
from test_fused_tp import CASES, VALID, assemble, run_shards

from megatron_klear.kernels import available, fused_logprobs, fused_policy_loss, fused_policy_loss_ref
from megatron_klear.rl.losses import GPPO, NLL

if not available().built:
    pytest.skip(f"the extension is not built: {available().reason}", allow_module_level=True)

TERMS = {"entropy_coefficient": 0.1, "kl_coefficient": 0.2, "temperature": 0.7}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def on(emulated: EmulatedDevice, arguments: dict[str, Any], **more: Any) -> Any:
    """Output and gradients of the fused loss on the emulated device."""
    emulated.launches = []
    with instead_of_the_twin(emulated):
        result = differentiate(fused_policy_loss, arguments, **more)
    assert emulated.launches, "the row kernels ran elsewhere"
    return result


def check(emulated: EmulatedDevice, arguments: dict[str, Any]) -> None:
    """Errors against float64 within twice those of torch in the same types, and near the CPU twin's results."""
    exact = differentiate(fused_policy_loss_ref, double(arguments))
    result = on(emulated, arguments)
    ours, theirs = errors(result, exact), errors(differentiate(fused_policy_loss_ref, arguments), exact)
    for key in ("loss", "logprobs", "entropy", "lse", "ratio", "hidden", "weight"):
        assert ours[key] <= 2 * theirs[key] + 1e-6, (key, ours, theirs)
    twin = errors(result, differentiate(fused_policy_loss, arguments))
    assert twin.pop("region") == 0
    assert max(twin.values()) < (1e-2 if arguments["hidden"].dtype == torch.bfloat16 else 1e-5), twin


@DTYPES
@pytest.mark.parametrize("name", FAMILY | OWN)
def test_errors_are_within_twice_those_of_torch(emulated: EmulatedDevice, name: str, dtype: torch.dtype) -> None:
    """In bf16 the gradient of the logits is narrowed over the logits."""
    arguments = problem(tokens=20, vocab=500, valid=487, dtype=dtype) | {"chunk_tokens": 6}
    terms = TERMS if name in ("gppo", "ppo", "sapo", "sigmoid") else {}
    check(emulated, arguments | terms | {"loss": (FAMILY | OWN)[name]})


@DTYPES
@pytest.mark.parametrize("kernel", ["two_read", "one_read"])
def test_either_row_kernel(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernel: str
) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    check(emulated, problem(tokens=9, vocab=4099, dtype=dtype) | {"chunk_tokens": 4, "loss": GPPO()} | TERMS)
    assert {launch.file for launch in emulated.launches} == {f"cuda_{kernel}.cu"}


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("vocab", [32_000, 128_256, 151_936, 262_144])
def test_vocabularies_of_models(emulated: EmulatedDevice, vocab: int, dtype: torch.dtype) -> None:
    arguments = problem(tokens=12, hidden=8, vocab=vocab, valid=vocab - 267, dtype=dtype, weighted=2.0)
    # no chunk of a single row, of which BLAS adds up 150,000 terms one after the other and loses two digits
    check(emulated, arguments | {"chunk_tokens": 4, "loss": GPPO()} | TERMS)


@DTYPES
def test_chunks_and_orders_give_the_same_bits(emulated: EmulatedDevice, dtype: torch.dtype) -> None:
    arguments = problem(tokens=24, vocab=1000, dtype=dtype) | {"loss": GPPO(dual_clip=2.0), "chunk_tokens": 7}
    first = on(emulated, arguments)
    for schedule in SCHEDULES.values():
        emulated.schedule(schedule)
        assert same_bits(on(emulated, arguments), first)
    # a row's outputs know nothing of its chunk; the products add up in another order
    other = on(emulated, arguments, chunk_tokens=20)
    assert torch.equal(other[0].logprobs, first[0].logprobs)
    assert max(relative(a, b) for a, b in zip(other[1:], first[1:], strict=True)) < (
        1e-6 if dtype == torch.float32 else 5e-3
    )


def test_main_grad_and_logprobs_alone(emulated: EmulatedDevice) -> None:
    arguments = problem(tokens=20, vocab=500, valid=497, dtype=torch.bfloat16) | {"loss": NLL(), "chunk_tokens": 8}
    total = torch.zeros(arguments["weight"].shape)
    for _ in range(2):
        output, *_ = on(emulated, arguments, main_grad=total, weight_grad="main_grad_tied")
    assert relative(total, 2 * differentiate(fused_policy_loss_ref, double(arguments))[2]) < 5e-3
    names = ("hidden", "weight", "targets", "vocab_size")
    with instead_of_the_twin(emulated):
        alone = fused_logprobs(**{name: arguments[name] for name in names})
    trained = output.lse != 0
    assert torch.equal(alone.logprobs[trained], output.logprobs[trained])


def emulated_shards(arguments: dict[str, Any], sequence_parallel: bool, main_grad: bool) -> tuple[Any, int]:
    """On every rank: what `run_shards` gives on an emulated device of the rank's own, and the last call's launches."""
    emulated = EmulatedDevice(build())
    emulated.schedule(SCHEDULES["random"])
    with instead_of_the_twin(emulated):
        return run_shards(arguments, sequence_parallel, True, main_grad), len(emulated.launches)


@pytest.mark.parametrize(
    ("size", "name", "valid", "sequence_parallel"),
    [
        (2, "gppo", "whole", False),
        (2, "gppo_terms", "padded", True),
        (2, "own", "padded", False),
        (4, "gppo", "idle_shard", True),
        (4, "nll", "padded", False),
        (4, "gppo_terms", "idle_shard", False),
    ],
)
def test_shards_of_the_vocabulary_equal_one_process(
    ranks: Any, emulated: EmulatedDevice, size: int, name: str, valid: str, sequence_parallel: bool
) -> None:
    """Each rank a process of its own; the reference is the CPU twin of the whole vocabulary."""
    arguments = problem(tokens=24, valid=VALID[valid], vocab=512) | CASES[name]
    expected = differentiate(fused_policy_loss, arguments)
    assert max(errors(on(emulated, arguments), expected).values()) < 1e-5
    results = ranks(size, emulated_shards, arguments, sequence_parallel, name == "gppo")
    assert all(launches for _, launches in results)
    shards = [runs for runs, _ in results]
    first, second = (assemble(shards, run, sequence_parallel) for run in range(2))
    found = errors(first, expected)
    assert found.pop("region") == 0
    assert max(found.values()) < 1e-5, found
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True)), "the same bits in every run"
    trained = first[0].lse != 0
    for _, logprobs in shards:
        assert relative(logprobs[trained], first[0].logprobs[trained]) < 1e-6
