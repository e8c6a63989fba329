"""`optimizer.cpu_offload` where transformer-engine's Adam is installed: through Megatron's precision-aware optimizer.

The card is emulated, and transformer-engine's functions. Both shares step by torch's AdamW whatever is installed.
"""

import pytest
import te_packages
from te_runs import stepped_at_share, tiny

from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.verify.layouts import layouts_named


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny(tmp_path_factory.mktemp("offload"), "qwen3", weights=True)
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})


def run(pool, config, layout, *args):
    results = pool(layout.processes, stepped_at_share, config, layout, *args)
    assert all(one[0] == results[0][0] for one in results)
    return results[0]


@pytest.mark.skipif(not te_packages.EVERYWHERE, reason="KLEAR_TE_LAYOUTS=1 runs it: half a minute")
@pytest.mark.parametrize("name", ["DP2 overlap", "TP2 SP"])
def test_a_run_moves_between_te_adam_on_the_card_and_shares_on_the_host(config, te_ranks, tmp_path, name):
    (layout,) = layouts_named([name])
    whole, classes = run(te_ranks, config, layout, 0.0, 4, tmp_path / "whole")
    assert "te.FusedAdam" in classes
    first, _ = run(te_ranks, config, layout, 0.0, 1, tmp_path / "one")
    second, classes = run(te_ranks, config, layout, 0.5, 1, tmp_path / "two", tmp_path / "one")
    assert {"HostOptimizer", "HostAdamW", "AdamW"} <= classes
    third, classes = run(te_ranks, config, layout, 0.0, 2, tmp_path / "three", tmp_path / "two")
    assert "te.FusedAdam" in classes
    assert first + second + third == pytest.approx(whole, rel=1e-4)
    run(te_ranks, config, layout, 1.0, 0, tmp_path / "on the host", tmp_path / "three")
    run(te_ranks, config, layout, 0.0, 0, tmp_path / "back", tmp_path / "on the host")
    for saved in ("on the host", "back"):
        assert compare_checkpoints(tmp_path / "three", tmp_path / saved).unequal_tensors == []
