"""NVIDIA Apex's Adam, a stand-in of its signature and state, takes the steps of torch's in the same layouts.

KLEAR_TE_LAYOUTS=1 runs them, and both kinds of optimizers through checkpoints: a minute.
"""

from types import SimpleNamespace

import pytest
import te_packages
import torch
from pool import Pool
from te_runs import load_and_save_again, measured, save_after_steps, tiny

from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.verify.layouts import ONE_PROCESS, compare, layouts_named, ragged_samples

STEPS = 3
pytestmark = pytest.mark.skipif(not te_packages.EVERYWHERE, reason="KLEAR_TE_LAYOUTS=1 runs them")


@pytest.fixture(scope="module")
def apex_ranks():
    pool = Pool(first="apex_process")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("apex"), "qwen3", weights=True)


def with_optimizer(config, **changes):
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("name", "distributed"),
    [("TP2 SP", False), ("DP2 overlap", True), ("PP2 CP2", True)],
)
def test_apex_adam_takes_the_steps_of_torchs(config, ranks, apex_ranks, name, distributed):
    (layout,) = layouts_named([name])
    samples = ragged_samples(512, longest=64)
    config = with_optimizer(config, distributed=distributed)
    torchs = ranks(layout.processes, measured, config, layout, samples, STEPS)[0]
    fused = with_optimizer(config, implementation="fused")
    apexs = apex_ranks(layout.processes, measured, fused, layout, samples, STEPS)[0]
    assert "AdamW" in torchs.classes
    assert {"FusedAdam"} == apexs.classes & {"FusedAdam", "AdamW"}
    found = compare(apexs.result, torchs.result, samples)
    assert found.within(1e-6), found
    for name, weight in torchs.weights.items():
        torch.testing.assert_close(apexs.weights[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_goes_on_with_apex_from_where_torch_left_it(config, ranks, apex_ranks, tmp_path, distributed):
    config = with_optimizer(config, distributed=distributed)
    expected = ranks(1, save_after_steps, config, ONE_PROCESS, tmp_path / "step-00000002", 2)[0]
    again = tmp_path / "apex"
    _, losses = apex_ranks(1, load_and_save_again, config, ONE_PROCESS, tmp_path / "step-00000002", again)[0]
    _, back = ranks(1, load_and_save_again, config, ONE_PROCESS, again, tmp_path / "back")[0]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert back == pytest.approx(expected, rel=1e-6)
    assert compare_checkpoints(tmp_path / "step-00000002", tmp_path / "back").unequal_tensors == []


def test_torchs_adam_cannot_be_had_where_apex_is(config, apex_ranks):
    with pytest.raises(RuntimeError, match="Megatron found a fused Adam"):
        apex_ranks(1, measured, with_optimizer(config, implementation="torch"), ONE_PROCESS, [SimpleNamespace()], 1)
