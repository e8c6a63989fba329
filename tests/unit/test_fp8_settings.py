"""`model.fp8`: what does not go with it is told before the run, and the plan says what a log-prob is a function of."""

from dataclasses import replace

import pytest

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.checks import check_layout
from megatron_klear.config.plan import describe_plan
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.models.shapes import planned_model


@pytest.fixture
def architecture():
    return planned_model("models/Qwen3-8B-Base").architecture


def config(recipe="blockwise", fp8="hybrid", capacity=32768, **parallel: object) -> SFTConfig:
    return SFTConfig.model_validate(
        {
            "output": "o",
            "model": {"path": "m", "fp8": fp8, "fp8_recipe": recipe},
            "data": {"train": ["a.jsonl"], "tokens_per_microbatch": capacity},
            "parallel": parallel,
        }
    )


@pytest.mark.parametrize(
    ("recipe", "parallel", "multiple"),
    [
        ("blockwise", {}, 128),
        ("tensorwise", {}, 16),
        ("blockwise", {"tensor": 4}, 512),
        ("blockwise", {"tensor": 4, "sequence": False}, 128),
        ("tensorwise", {"tensor": 2, "context": 2}, 64),
        ("blockwise", {"context": 4, "tensor": 2}, 1024),
    ],
)
def test_rows_are_padded_so_that_every_shard_is_what_products_take(architecture, recipe, parallel, multiple):
    run = config(recipe, **parallel)
    assert run.row_multiple == multiple
    assert run.row_multiple % run.parallel.row_multiple == 0
    assert check_layout(run, architecture, run.parallel.model_size) == []
    assert f"{multiple} tokens" in describe_plan(run, architecture, run.parallel.model_size)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "context": 2}, {"context": 4}])
def test_rows_without_fp8_are_padded_as_ever(architecture, parallel):
    run = config(fp8="off", **parallel)
    assert run.row_multiple == run.parallel.row_multiple
    assert "FP8" not in describe_plan(run, architecture, run.parallel.model_size)


def test_delayed_scaling_is_refused_in_both_kinds_of_runs(architecture):
    run = config("delayed")
    (told,) = check_layout(run, architecture, 1)
    assert told.startswith("model.fp8_recipe = delayed")
    assert "what was computed before" in told
    assert told.endswith("use blockwise or tensorwise")
    assert check_layout(config("delayed", fp8="off"), architecture, 1) == []
    tables = {"prompts": {"sources": [{"files": ["p.jsonl"]}]}, "sampling": {"max_tokens": 1024}, "train": {"steps": 1}}
    rl = GPPOConfig.model_validate({"output": "o", "model": run.model.model_dump(), **tables})
    assert any("model.fp8_recipe = delayed" in problem for problem in check_layout(rl, architecture, 1))


@pytest.mark.parametrize(
    ("change", "run", "told"),
    [
        ({"ffn_hidden_size": 12296}, config(), "a rank's intermediate_size is 12296"),
        ({"hidden_size": 4112}, config(), None),
        ({"hidden_size": 4112}, config(tensor=2), "hidden_size is 4112; use tensorwise"),
        ({"hidden_size": 4112}, config(tensor=2, sequence=False), None),
        ({"hidden_size": 4112}, config("tensorwise", tensor=2), None),
        ({"head_dim": 8}, config(tensor=8), None),
        ({"head_dim": 8, "num_heads": 8}, config(tensor=8), "queries, num_attention_heads x head_dim is 8"),
    ],
)
def test_matrices_of_sizes_that_products_do_not_take_are_named(architecture, change, run, told):
    problems = check_layout(run, replace(architecture, **change), run.parallel.model_size)
    assert any(told in problem for problem in problems) if told else problems == []


def test_full_rows_do_not_grow_beyond_their_capacity(architecture):
    run = config(capacity=32768 + 64, tensor=2)
    (told,) = check_layout(run, architecture, 2)
    assert "data.tokens_per_microbatch 32832 is not a multiple of 256" in told
    assert told.endswith("use 33024")


@pytest.mark.parametrize(
    ("recipe", "function"),
    [("blockwise", "the weights and of its sequence"), ("tensorwise", "what is packed with it included")],
)
def test_the_plan_says_what_a_logprob_is_a_function_of(architecture, recipe, function):
    plan = describe_plan(config(recipe), architecture, 1)
    assert f"{recipe} scaling" in plan
    assert function in plan
