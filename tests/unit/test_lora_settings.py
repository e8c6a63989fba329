"""`[lora]`: what does not go together is told before the run, and the plan of memory knows what is trained."""

import pytest
from pydantic import ValidationError

from megatron_klear.config.base import LoraConfig, SFTConfig
from megatron_klear.config.checks import check_layout
from megatron_klear.config.memory import adapter_parameters, stage_memory
from megatron_klear.config.plan import describe_plan
from megatron_klear.models.shapes import planned_model
from megatron_klear.runs.log import Throughput


@pytest.fixture
def architecture():
    return planned_model("models/Qwen3-8B-Base").architecture


def config(**tables: dict[str, object]) -> SFTConfig:
    plain = {"output": "o", "model": {"path": "m"}, "data": {"train": ["a.jsonl"]}}
    return SFTConfig.model_validate(plain | tables)


def test_without_the_table_nothing_is_adapted(architecture):
    assert config().lora is None
    assert adapter_parameters(config(), architecture) == 0
    assert "adapters" not in describe_plan(config(), architecture, 1)


@pytest.mark.parametrize("targets", [("all", "q_proj"), ("q_proj", "q_proj"), ("lm_head",), ("embed_tokens",), ()])
def test_targets_that_mean_nothing_are_refused(targets):
    with pytest.raises(ValidationError):
        LoraConfig(targets=targets)


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"model": {"path": "m", "transformer_engine": "on"}}, "model.transformer_engine"),
        ({"model": {"path": "m", "fp8": "hybrid"}}, "model.fp8"),
        ({"optimizer": {"cpu_offload": 0.5}}, "optimizer.cpu_offload"),
    ],
)
def test_settings_that_do_not_go_with_adapters_are_named(architecture, tables, told):
    assert not [problem for problem in check_layout(config(**tables), architecture, 1) if "[lora]" in problem]
    problems = [p for p in check_layout(config(lora={"rank": 8}, **tables), architecture, 1) if "[lora]" in p]
    assert len(problems) == 1
    assert told in problems[0]


def test_adapters_are_counted_as_peft_counts_them(architecture):
    """rank * (in + out) of every matrix; 43.6 million at rank 16 is what peft's print_trainable_parameters says."""
    assert adapter_parameters(config(lora={"rank": 16}), architecture) == 43_646_976
    of_two = adapter_parameters(config(lora={"rank": 16, "targets": ["q_proj", "o_proj"]}), architecture)
    assert of_two == 36 * 16 * (4096 + 4096) * 2


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (4, 2)])
def test_ranks_hold_the_whole_of_what_is_not_cut(architecture, tensor, pipeline):
    run = config(lora={"rank": 8}, parallel={"tensor": tensor, "pipeline": pipeline})
    whole = 5 * 4096 + 4096 + 4096  # A of q, k, v, gate, up, and B of o, down, on every tensor rank
    cut = 4096 + 2 * 1024 + 2 * 12288 + 4096 + 12288
    assert adapter_parameters(run, architecture) == 36 // pipeline * 8 * (whole + cut // tensor)


def test_gradients_and_optimizer_state_are_of_the_adapters_alone(architecture):
    whole, adapted = config(), config(lora={"rank": 16})
    full, lora = (stage_memory(run, architecture, 0, 1, 4096, 1) for run in (whole, adapted))
    trained = adapter_parameters(adapted, architecture)
    assert lora.parameters == full.parameters + 2 * trained
    assert (lora.gradients, lora.optimizer) == (4 * trained, 12 * trained)
    assert lora.activations == full.activations
    assert "43,646,976 a rank" in describe_plan(adapted, architecture, 1)


def test_a_frozen_matrix_has_no_gradient_to_count_in_the_utilisation(architecture):
    def mfu(run: SFTConfig) -> float:
        found = Throughput.of(run, architecture, 1, "NVIDIA H100").mfu(1000.0, 1.0)
        assert found is not None
        return found

    assert mfu(config(lora={"rank": 8})) == pytest.approx(mfu(config()) * 2 / 3, rel=1e-3)
