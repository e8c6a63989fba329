"""No row that the engine lays out is of a size that transformer-engine refuses in FP8, by its own checks.

KLEAR_TE_LAYOUTS=1 takes rows of every length from 1 to 4,096 in every layout, and every version that was fetched.
"""

import numpy as np
import pytest
import te_packages
from te_fp8 import LAYOUTS, built_recipe, recipe_on, refused
from te_runs import tiny

from megatron_klear.config.base import FP8_TOKENS, ParallelConfig
from megatron_klear.config.checks import check_layout
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.models.architecture import read_architecture

LONGEST = 4096
VERSIONS = te_packages.versions() if te_packages.EVERYWHERE else [te_packages.NEWEST]
SHAPE = TinyShape(hidden_size=512, ffn_hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=32)
"""Divides over 8 tensor ranks, and its hidden size is of whole blocks."""
RECIPES = {"blockwise": "Float8BlockScaling", "tensorwise": "Float8CurrentScaling"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    config = tiny(folder, "qwen3")
    write_tiny_model(folder / "wide", "qwen3", SHAPE, weights=False)
    model = config.model.model_copy(update={"path": folder / "wide", "fp8": "hybrid", "dtype": "bf16"})
    data = config.data.model_copy(update={"tokens_per_microbatch": LONGEST, "max_length": LONGEST})
    return config.model_copy(update={"model": model, "data": data})


def with_recipe(config, recipe):
    return config.model_copy(update={"model": config.model.model_copy(update={"fp8_recipe": recipe})})


def rows():
    """One sequence of every length, and several of together as many tokens."""
    every = te_packages.EVERYWHERE
    generator = np.random.default_rng(0)
    lengths = range(1, LONGEST + 1) if every else [*range(1, 20), *range(120, 140), *range(250, LONGEST, 331), LONGEST]
    several = [generator.integers(1, 200, size=generator.integers(2, 20)).tolist() for _ in range(500 if every else 20)]
    return [[length] for length in lengths] + several


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("recipe", FP8_TOKENS)
def test_no_row_meets_an_alignment_that_te_refuses(config, te_pools, version, recipe):
    chosen = with_recipe(config, recipe)
    architecture = read_architecture(config.model.path)
    layouts = [one for one in LAYOUTS if te_packages.EVERYWHERE or one.pipeline == 1]
    for parallel in layouts:
        run = chosen.model_copy(update={"parallel": parallel})
        assert check_layout(run, architecture, parallel.model_size) == []
    assert te_pools(version)(2, refused, chosen, layouts, rows(), timeout_seconds=1200.0) == [[], []]


@pytest.mark.parametrize("recipe", FP8_TOKENS)
def test_te_refuses_rows_that_are_padded_for_the_layout_alone(config, te_ranks, recipe):
    one = [ParallelConfig()]
    found = te_ranks(1, refused, with_recipe(config, recipe), one, [[n] for n in range(1, 65)], False)[0]
    lengths = {int(problem.split("[")[1].split("]")[0]) for problem in found}
    assert lengths == {n for n in range(1, 65) if n % 16}
    assert any("FP8 execution requires" in problem for problem in found)


def test_te_refuses_blocks_that_a_shard_cuts(config, te_ranks):
    """The layout's own padding and 16 tokens are not enough where blocks are gathered."""
    sharded = [ParallelConfig(tensor=2)]
    found = te_ranks(1, refused, with_recipe(config, "blockwise"), sharded, [[64]], False)[0]
    assert any("as it is gathered" in problem for problem in found)
    assert te_ranks(1, refused, with_recipe(config, "tensorwise"), sharded, [[64]], False)[0] == []


@pytest.mark.parametrize(
    ("recipe", "card", "told"),
    [
        ("blockwise", (9, 0, "12.9"), None),
        ("blockwise", (9, 0, "12.8"), "CUDA >= 12.9"),
        ("tensorwise", (9, 0, "12.8"), None),
        ("tensorwise", (8, 0, "12.8"), "compute capability 8.9"),
    ],
)
def test_a_card_that_cannot_compute_the_recipe_is_told_before_a_model_is_built(config, te_ranks, recipe, card, told):
    found = te_ranks(1, recipe_on, with_recipe(config, recipe), *card)[0]
    assert told in found if told else not found
    assert not told or f"model.fp8_recipe = {recipe}" in found


@pytest.mark.parametrize(("recipe", "name"), RECIPES.items())
def test_the_recipe_of_the_settings_is_the_one_that_layers_are_built_for(config, te_ranks, recipe, name):
    found, classes = te_ranks(1, built_recipe, with_recipe(config, recipe))[0]
    assert found == name
    assert "TELayerNormColumnParallelLinear" in classes
