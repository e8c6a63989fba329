"""Models with experts: how config.json is read, what is refused before work starts, and what a rank holds."""

import numpy as np
import pytest
import transformers
from rl_groups import gppo_config

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.checks import check_layout
from megatron_klear.config.memory import stage_experts, stage_memory, stage_parameters
from megatron_klear.config.plan import describe_rl_plan
from megatron_klear.data.tiny import TinyShape, tiny_config
from megatron_klear.models.architecture import ArchitectureError, architecture_from_config
from megatron_klear.orchestrator.step_numbers import TokenArrays
from megatron_klear.types import Sample, route_type

CONFIG = tiny_config("qwen3_moe", TinyShape())
MOE = architecture_from_config(CONFIG)
DENSE = architecture_from_config(tiny_config("qwen3"))


def config(model=None, **parallel) -> SFTConfig:
    return SFTConfig.model_validate(
        {"output": "o", "model": {"path": "m", **(model or {})}, "data": {"train": ["a"]}, "parallel": parallel}
    )


def test_what_transformers_saves_is_read_as_what_is_published():
    saved = transformers.AutoConfig.for_model(**CONFIG).to_dict()
    assert architecture_from_config(saved).experts == MOE.experts
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in CONFIG.items()}
    assert architecture_from_config(renamed).experts == MOE.experts


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] is not supported"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"num_experts": None}, "num_experts is None"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of 8 experts"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changed: dict, told: str):
    with pytest.raises(ArchitectureError, match=told):
        architecture_from_config({**CONFIG, **changed})


@pytest.mark.parametrize(
    ("parallel", "processes", "told"),
    [
        ({"expert": 3}, 3, ["parallel.expert 3 does not divide", "1, 2, 4"]),
        ({"tensor": 2, "expert_tensor": 3}, 6, ["parallel.expert_tensor 3", "moe_intermediate_size 32"]),
        ({"tensor": 2, "expert": 4}, 2, ["2 processes do not divide", "multiple of 4"]),
        ({"tensor": 2, "sequence": False}, 2, ["parallel.sequence = true"]),
        ({"tensor": 2, "expert": 2, "expert_tensor": 2}, 4, ["parallel.expert_tensor = 1"]),
    ],
)
def test_a_layout_that_cannot_work_is_refused(parallel: dict, processes: int, told: list[str]):
    problems = check_layout(config(**parallel), MOE, processes)
    assert len(problems) == 1
    for words in told:
        assert words in problems[0]


def test_settings_of_experts_are_refused_without_any():
    asked = config({"moe_aux_loss": 1e-3, "moe_z_loss": 1e-3}, expert=2, expert_tensor=1)
    assert [problem.split()[0] for problem in check_layout(asked, DENSE, 2)] == [
        "parallel.expert",
        "parallel.expert_tensor",
        "model.moe_aux_loss",
        "model.moe_z_loss",
    ]


def test_ranks_hold_the_model_between_them():
    experts = MOE.num_layers * 8 * MOE.expert_parameters
    for parallel, ranks in (
        ({"expert": 4}, 4),
        ({"tensor": 2}, 2),
        ({"tensor": 2, "expert": 2}, 2),
        ({"pipeline": 2}, 2),
    ):
        held = stage_experts(config(**parallel), MOE, 0)
        assert held * ranks == experts, parallel
    assert stage_parameters(config(), MOE, 0) == MOE.num_parameters


def test_optimizer_state_of_experts_is_sharded_over_those_that_hold_the_same():
    dense = MOE.num_parameters - MOE.num_layers * 8 * MOE.expert_parameters
    memory = stage_memory(config(expert=2), MOE, 0, data_parallel=4, row_tokens=64, microbatches=1)
    experts = (MOE.num_parameters - dense) // 2
    assert memory.optimizer == 12 * dense // 4 + 12 * experts // 2
    assert memory.parameters == 2 * (dense + experts)


def test_flops_are_those_of_the_chosen_experts():
    chosen = 3 * 64 * 32 * 2
    layer = 64 * (2 * 64 + 2 * 32) + 8 * 64 + chosen
    assert MOE.flops_per_token(0) == 6 * (4 * layer + 512 * 64)


@pytest.mark.parametrize("replayed", [True, False])
def test_the_plan_counts_what_samples_take_on_the_first_ranks_host(tmp_path, replayed: bool):
    a3b = {**CONFIG, "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8}
    algorithm = {"prompts_per_step": 64, **({"router_replay": "sampler"} if replayed else {})}
    train = {"tokens_per_microbatch": 16512}
    gppo = gppo_config(tmp_path, {"sampling": {"max_tokens": 16384}, "algorithm": algorithm, "train": train})
    length = gppo.prompts.max_tokens + gppo.sampling.max_tokens
    routes = np.zeros((length - 1, 48, 8), route_type(128)) if replayed else None
    tokens, trained = np.zeros(length, np.int32), np.ones(length, np.bool_)
    sample = Sample(tokens=tokens, trained=trained, logprobs=np.zeros(length, np.float32), routes=routes)
    drawn = gppo.algorithm.prompts_per_step * gppo.sampling.samples_per_prompt
    # What was drawn, and twice what of it is given out.
    gib = 3 * drawn * sum(len(part.ravel().view(np.uint8)) for part in arrays_of(sample)) / 2**30
    plan = describe_rl_plan(gppo, architecture_from_config(a3b), 1)
    (line,) = [line for line in plan.split("\n") if "samples on rank 0's host" in line]
    assert ("393 bytes a token, 384 of them routes" if replayed else "9 bytes a token") in line
    assert gib > 0.01
    assert f"{gib:.2f} GiB" in line


def arrays_of(sample: Sample) -> list[np.ndarray]:
    arrays = TokenArrays.of({0: sample})
    return [part for part in (arrays.tokens, arrays.trained, arrays.logprobs, arrays.routes) if part is not None]
