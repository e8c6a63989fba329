"""transformer-engine's own layers and Adam, its CUDA functions emulated, against Megatron's layers in one process.

KLEAR_TE_LAYOUTS=1 runs every layout in all versions that were fetched.
"""

import pytest
import te_packages
from te_runs import layers, measured, measured_unmarked, tiny

from megatron_klear.verify.layouts import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    ONE_PROCESS,
    Layout,
    compare,
    layouts_named,
    ragged_samples,
)

TOLERANCE = 1e-5
STEPS = 2
OLDEST_IN_SHORT = (te_packages.OLDEST, "TP2 SP")
CLASSES = {"te.LayerNormLinear", "te.Linear", "te.RMSNorm", "te.FusedAdam"}
LOCAL_CLASSES = {"ColumnParallelLinear", "RowParallelLinear", "RMSNorm", "AdamW"}


def _case(family, tmp_path_factory, ranks):
    config = tiny(tmp_path_factory.mktemp(family), family)
    samples = ragged_samples(512, longest=64)
    local = ranks(1, measured, layers(config, "off"), ONE_PROCESS, samples, STEPS)[0]
    assert local.classes > LOCAL_CLASSES
    assert not local.calls
    return layers(config, "on"), samples, local


@pytest.fixture(scope="module")
def dense(tmp_path_factory, ranks):
    return _case("qwen3", tmp_path_factory, ranks)


@pytest.fixture(scope="module")
def experts(tmp_path_factory, ranks):
    return _case("qwen3_moe", tmp_path_factory, ranks)


def check(case, ranks, layout: Layout, classes):
    config, samples, local = case
    results = ranks(layout.processes, measured, config, layout, samples, STEPS)
    for one in results:
        assert one.classes >= classes
        assert not one.classes & LOCAL_CLASSES - {"ColumnParallelLinear"}  # the head, where the loss is computed
        assert one.result.losses == results[0].result.losses
    found = compare(results[0].result, local.result, samples)
    assert found.within(TOLERANCE), found
    assert found.logprobs <= TOLERANCE
    for name, weight in local.weights.items():
        assert (results[0].weights[name] - weight).abs().max() <= TOLERANCE, name
    return results


def cases(all_layouts, *in_short):
    """Versions and names of layouts."""
    chosen = in_short
    if te_packages.EVERYWHERE:
        chosen = [(version, layout.name) for version in te_packages.versions() for layout in all_layouts]
    return pytest.mark.parametrize(("version", "name"), chosen)


@cases(LAYOUTS, *((te_packages.NEWEST, name) for name in ("TP2 SP", "PP2", "CP2", "DP2")), OLDEST_IN_SHORT)
def test_te_layers_give_the_numbers_of_local_ones(dense, te_pools, version, name):
    (layout,) = layouts_named([name])
    for one in check(dense, te_pools(version), layout, CLASSES - ({"te.RMSNorm"} if layout.pipeline > 1 else set())):
        assert one.calls["generic_gemm"] > 100
        assert one.calls["rmsnorm_bwd"] > 10
        assert one.calls["multi_tensor_adam"]


@cases(EXPERT_LAYOUTS, (te_packages.NEWEST, "TP2 SP EP2"))
def test_grouped_experts_give_the_numbers_of_local_ones(experts, te_pools, version, name):
    (layout,) = layouts_named([name])
    for one in check(experts, te_pools(version), layout, {"te.GroupedLinear"}):
        assert one.calls["te_general_grouped_gemm"] > 10


def test_the_gate_sees_norms_that_are_not_marked(dense, te_ranks):
    config, samples, local = dense
    (layout,) = layouts_named(["TP2 SP"])
    result = te_ranks(2, measured_unmarked, config, layout, samples, STEPS)[0].result
    assert not compare(result, local.result, samples).within(TOLERANCE)
