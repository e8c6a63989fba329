"""The trainer gives its memory back between steps and takes it again: no bit of what follows is another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import SHAPE, write_run
from tiny_run import start as start_run

from megatron_klear.config.base import SFTConfig
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.verify.layouts import layouts_named, ragged_samples


def held(engine: Engine) -> dict[str, int]:
    """Bytes of gradient buffers and of optimizer state, storages of the model left out."""
    model = {p.untyped_storage().data_ptr() for chunk in engine.chunks for p in chunk.parameters()}
    state = {}
    for part in engine.optimizer.chained_optimizers:
        tensors = [p for group in part.optimizer.param_groups for p in group["params"]]
        tensors += [value for values in part.optimizer.state.values() for value in values.values()]
        for tensor in tensors:
            if tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in model:
                state[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    buffers = [buffer.grad_data.untyped_storage().nbytes() for chunk in engine.chunks for buffer in chunk.buffers]
    return {"gradients": sum(buffers), "optimizer": sum(state.values())}


def trained(config: SFTConfig, layout, folder: Path) -> tuple[list[list], list[dict[str, int]], int]:
    """Three runs of three steps: awake all the time, asleep in between, and loaded from a save out of sleep."""
    laid_out = layout.apply(config)
    with world(laid_out.parallel, laid_out.seed) as topology:
        samples = ragged_samples(SHAPE.vocab_size, longest=32, count=4)
        weights = loss_weights(np.array([num_predicted(sample) for sample in samples]), "token_mean")
        rows = [pack([sample], [float(weight)]) for sample, weight in zip(samples, weights, strict=True)]
        rows = rows[topology.data.rank :: topology.data.size]

        def result(engine: Engine, seen: list) -> list:
            return [*seen, *(tensor.clone() for _, tensor in engine.hf_weights())]

        awake = Engine(laid_out, topology)
        for row in awake._rows(rows):  # all rows of a rollout step lie on the card at once: no table a token
            assert row.params.cosine is None
        expected = result(awake, [awake.train_step(rows, NLL()).grad_norm for _ in range(3)])
        engine, norms, sizes, released = Engine(laid_out, topology), [], [], 0
        for step in range(3):
            norms.append(engine.train_step(rows, NLL()).grad_norm)
            if step == 2:
                break
            before = engine.logprobs(rows)
            sizes.append(held(engine))
            released = engine.sleep()
            assert engine.sleep() == 0
            sizes.append(held(engine))
            assert all(map(torch.equal, engine.logprobs(rows), before))
            if step == 1:
                engine.save(folder)
                engine.finish_save()
                sizes.append(held(engine))
        slept = result(engine, norms)
        resumed = Engine(laid_out, topology)
        resumed.sleep()
        resumed.load(folder)
        loaded = result(resumed, [*norms[:2], resumed.train_step(rows, NLL()).grad_norm])
        for one in (awake, engine, resumed):
            one.close()
        return [expected, slept, loaded], sizes, released


@pytest.mark.parametrize(
    ("layout", "dtype", "distributed"),
    [
        ("DP2 overlap", "bf16", "true"),
        ("DP2 overlap", "fp32", "true"),
        ("TP2", "bf16", "false"),
        ("PP2", "fp32", "false"),
    ],
)
def test_sleep_releases_memory_and_changes_no_bit(tmp_path, ranks, layout: str, dtype: str, distributed: str):
    flags = ("--model.dtype", dtype, "--optimizer.distributed", distributed)
    config = start_run(write_run(tmp_path), *flags).config
    (chosen,) = layouts_named([layout])
    for runs, sizes, released in ranks(chosen.processes, trained, config, chosen, tmp_path / "saved"):
        expected, *others = runs
        for other in others:
            for ours, theirs in zip(other, expected, strict=True):
                assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        awake, asleep, *_, saved = sizes
        assert asleep == {"gradients": 0, "optimizer": 0}
        assert released == sum(awake.values())
        assert min(awake.values()) > 0
        assert saved == awake
