"""The plan of a run against exact counts: transformers' parameters, autograd's saved tensors, known arithmetic."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_klear.config.activations import layer_activation_bytes, layers_in_flight
from megatron_klear.config.base import SFTConfig
from megatron_klear.config.checks import check_layout, check_packages, check_resume, check_run, warn_run
from megatron_klear.config.memory import stage_memory, stage_parameters
from megatron_klear.config.plan import describe_plan, plan_run
from megatron_klear.config.read import write_resolved
from megatron_klear.models.architecture import Architecture, architecture_from_config

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}


def shape(model_type: str = "qwen3", **more: object) -> Architecture:
    head = {"head_dim": 16} if model_type == "qwen3" else {}
    return architecture_from_config({"model_type": model_type, **TINY, **head, **more})


def config(**tables: dict[str, object]) -> SFTConfig:
    tables = {"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}} | tables
    tables["model"] = {"path": "m", **tables["model"]}
    tables["data"] = {"train": ["a.jsonl"], **tables["data"]}
    return SFTConfig.model_validate({"output": "o", **tables})


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_that_of_transformers(model_type: str, tied: bool):
    import transformers

    architecture = shape(model_type, tie_word_embeddings=tied)
    head = {"head_dim": 16} if model_type == "qwen3" else {}
    hf = transformers.AutoConfig.for_model(model_type, **TINY, **head, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(hf)
    assert architecture.num_parameters == sum(p.numel() for p in model.parameters())
    assert stage_parameters(config(), architecture, 0) == architecture.num_parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (2, 1), (2, 2), (4, 4)])
def test_stages_sum_to_the_model(tied: bool, tensor: int, pipeline: int):
    """Over stages and tensor ranks: the model, plus copied norms, padded rows and the copy of a tied head."""
    architecture = shape(tie_word_embeddings=tied, num_key_value_heads=4)
    run = config(parallel={"tensor": tensor, "pipeline": pipeline})
    held = sum(stage_parameters(run, architecture, stage) for stage in range(pipeline)) * tensor
    norms = architecture.num_layers * (2 * 32 + 2 * 16) + 32
    padding = (architecture.padded_vocab_size(tensor) - 101) * 32
    heads = 2 if not tied or pipeline > 1 else 1
    copies = padding * heads + (101 * 32 if tied and pipeline > 1 else 0)
    assert held == architecture.num_parameters + norms * (tensor - 1) + copies


def saved_bytes(architecture: Architecture, tokens: int) -> int:
    """Bytes autograd keeps for one layer as a GPU computes it, norms and SwiGLU fused; weights and angles left out."""
    import torch

    functional = torch.nn.functional
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    q, kv, dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad

    class SwiGLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate_up):
            ctx.save_for_backward(gate_up)
            gate, up = gate_up.split([ffn, ffn], dim=1)
            return functional.silu(gate) * up

        @staticmethod
        def backward(ctx, grad):
            return torch.cat([grad, grad], dim=1)

    weights = [
        torch.randn(n, m, requires_grad=True)
        for n, m in [((q + 2 * kv) * dim, hidden), (hidden, q * dim), (2 * ffn, hidden), (hidden, ffn)]
    ]
    qkv_weight, out_weight, up_weight, down_weight = weights
    ignored = {w.untyped_storage().data_ptr() for w in weights}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = torch.randn(tokens, hidden, requires_grad=True)
        q_, k_, v_ = (Norm.apply(x) @ qkv_weight.T).split([q * dim, kv * dim, kv * dim], dim=1)
        q_ = q_.clone()  # Megatron copies the queries out and leaves keys and values where they are
        q_, k_, v_ = (t.view(1, tokens, -1, dim).transpose(1, 2) for t in (q_, k_, v_))
        if architecture.qk_norm:
            q_, k_ = Norm.apply(q_), Norm.apply(k_)
        q_, k_ = q_ * 1.0, k_ * 1.0
        out = functional.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)
        x = x + out.transpose(1, 2).reshape(tokens, -1) @ out_weight.T
        x = x + SwiGLU.apply(Norm.apply(x) @ up_weight.T) @ down_weight.T
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_layer_activations_are_what_autograd_keeps(model_type: str):
    architecture = replace(shape(model_type), hidden_size=128, ffn_hidden_size=320, head_dim=32)
    run = config(model={"dtype": "fp32"})
    estimated = layer_activation_bytes(run, architecture, 512)
    assert estimated == pytest.approx(saved_bytes(architecture, 512), rel=0.02)


def test_activations_split_over_tensor_and_context_ranks():
    architecture = shape(num_key_value_heads=4)
    whole = layer_activation_bytes(config(), architecture, 256)
    assert layer_activation_bytes(config(parallel={"tensor": 4}), architecture, 256) * 4 == whole
    context = layer_activation_bytes(config(parallel={"context": 2}), architecture, 256)
    rotated_keys, gathered = 4 * 16 * 2, 2 * 4 * 16 * 2  # a layer's of a token: local, and of the whole row
    assert context * 2 == whole + 256 * (2 * gathered - rotated_keys)


def test_recompute_keeps_less():
    architecture = shape()
    sizes = [
        stage_memory(config(recompute={"granularity": g}), architecture, 0, 1, 4096, 4).activations
        for g in ("none", "selective", "full")
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_layers_in_flight_follow_the_schedules():
    architecture = shape(num_hidden_layers=16)
    plain = config(parallel={"pipeline": 4})
    assert [layers_in_flight(plain, architecture, stage, 8) for stage in range(4)] == [16, 12, 8, 4]
    assert layers_in_flight(plain, architecture, 0, 2) == 8
    interleaved = config(parallel={"pipeline": 4, "virtual_pipeline": 2})
    # Korthikanti et al.: L * (1 + (p - 1) / (p * m)) = 16 * (1 + 3 / 8)
    assert layers_in_flight(interleaved, architecture, 0, 8) == 22


def test_state_is_sharded_over_data_and_context_ranks():
    architecture = shape()
    n = architecture.num_parameters
    bf16 = stage_memory(config(), architecture, 0, 1, 64, 1)
    assert (bf16.parameters, bf16.gradients, bf16.optimizer) == (2 * n, 4 * n, 12 * n)
    fp32 = stage_memory(config(model={"dtype": "fp32"}), architecture, 0, 1, 64, 1)
    assert (fp32.parameters, fp32.gradients, fp32.optimizer) == (4 * n, 4 * n, 8 * n)
    sharded = stage_memory(config(parallel={"context": 2}), architecture, 0, 4, 64, 1)
    assert sharded.optimizer == -(-12 * n // 8)
    whole = stage_memory(config(optimizer={"distributed": False}), architecture, 0, 4, 64, 1)
    assert whole.optimizer == 12 * n
    offloaded = stage_memory(config(optimizer={"cpu_offload": 1.0}), architecture, 0, 1, 64, 1)
    assert (offloaded.optimizer, offloaded.host, bf16.host) == (0, 16 * n, 0)
    half = stage_memory(config(optimizer={"cpu_offload": 0.5}), architecture, 0, 4, 64, 1)
    assert (half.optimizer, half.host) == (round(12 * n / 8), 2 * n)
    assert half.total == sum((half.parameters, half.gradients, half.optimizer, half.activations, half.working))


def test_batch_arithmetic():
    run = config(parallel={"tensor": 2}, train={"rows_per_step": 8, "epochs": 3})
    batch = plan_run(run, shape(), 8, num_rows=20).batch
    assert (batch.data_parallel, batch.microbatches, batch.max_tokens_per_step) == (4, 2, 8 * 32768)
    assert (batch.steps_per_epoch, batch.total_steps) == (3, 9)
    assert plan_run(config(train={"steps": 5}), shape(), 1, num_rows=800).batch.total_steps == 5


def test_description_says_all_parts_and_whether_it_fits():
    run = config(parallel={"pipeline": 2})
    shown = describe_plan(run, shape(), 4, num_rows=100, device_memory_bytes=2**20)
    for part in ("gradients", "optimizer state", "activations", "at work", "total", "steps per epoch", "DOES NOT FIT"):
        assert part in shown
    assert "recompute.granularity" in shown
    assert "DOES NOT FIT" not in describe_plan(run, shape(), 4, device_memory_bytes=2**40)
    assert json.loads(json.dumps(plan_run(run, shape(), 4).to_json()))["batch"]["data_parallel"] == 2


@pytest.mark.parametrize(
    ("parallel", "world_size", "told"),
    [
        ({"tensor": 3}, 3, ["parallel.tensor 3", "num_attention_heads 4", "num_key_value_heads 2"]),
        ({"tensor": 2}, 3, ["3 processes", "a multiple of 2"]),
        ({"pipeline": 3}, 3, ["num_hidden_layers 4", "parallel.pipeline 3"]),
        ({"pipeline": 2, "virtual_pipeline": 4}, 2, ["parallel.virtual_pipeline 4"]),
    ],
)
def test_layout_errors_name_key_and_remedy(parallel: dict[str, int], world_size: int, told: list[str]):
    shown = "\n".join(
        check_layout(
            config(parallel=parallel, data={"segment_multiple": 192, "tokens_per_microbatch": 36864}),
            shape(),
            world_size,
        )
    )
    for words in told:
        assert words in shown


def test_blocks_of_full_recomputation_end_with_the_layers_of_a_chunk():
    def problems(layers: int, method: str = "uniform", **parallel: int) -> list[str]:
        recompute = {"granularity": "full", "layers": layers, "method": method}
        processes = parallel.get("pipeline", 1)
        return check_layout(config(parallel=parallel, recompute=recompute), shape(), processes)

    for layers in (3, 8):
        (told,) = problems(layers)
        assert f"recompute.layers {layers}" in told
        assert "use 1, 2, 4" in told
        assert problems(layers, "block") == []
    assert problems(4) == []
    (told,) = problems(4, pipeline=2)
    assert "the 2 layers" in told


def test_key_value_heads_divide_over_tensor_ranks():
    assert any("num_key_value_heads 2" in e for e in check_layout(config(parallel={"tensor": 4}), shape(), 4))
    assert check_layout(config(parallel={"tensor": 2}), shape(), 2) == []
    six = shape(num_attention_heads=12, num_key_value_heads=6)
    assert any("num_key_value_heads 6" in e for e in check_layout(config(parallel={"tensor": 4}), six, 4))


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"parallel": {"device": "cpu"}}, "parallel.device is cpu"),
        ({"optimizer": {"distributed": False}}, "optimizer.distributed = true"),
        ({"model": {"dtype": "fp32"}}, "model.dtype = bf16"),
    ],
)
def test_offload_that_cannot_work_is_refused(tables: dict[str, dict[str, object]], told: str):
    def problems(share: float) -> list[str]:
        tables_of = tables | {"optimizer": {"cpu_offload": share, **tables.get("optimizer", {})}}
        return check_layout(config(**tables_of), shape(), 1)

    (problem,) = problems(0.25)
    assert told in problem
    assert "optimizer.cpu_offload = 0.25" in problem
    assert problems(0.0) == []


def test_batch_errors():
    errors = "\n".join(check_run(config(train={"rows_per_step": 3}), shape(), 2))
    assert "train.rows_per_step 3" in errors
    assert "use 2 or 4" in errors
    run = config(parallel={"pipeline": 2, "virtual_pipeline": 2}, train={"rows_per_step": 3})
    assert "multiple of 2" in "\n".join(check_run(run, shape(), 2))


def test_packages_are_asked_for_by_name():
    run = config(
        model={"fp8": "hybrid", "attention": "flash", "transformer_engine": "on"},
        optimizer={"implementation": "fused"},
        logging={"wandb_project": "p"},
    )
    missing = "\n".join(check_packages(run, importable=lambda name: False))
    for name in ("transformer-engine", "flash-attn", "Apex", "wandb", "tensorboard"):
        assert name in missing
    assert check_packages(run, importable=lambda name: True) == []
    on_cpu = run.model_copy(update={"parallel": run.parallel.model_copy(update={"device": "cpu"})})
    assert sum("needs a GPU" in e for e in check_packages(on_cpu, importable=lambda name: True)) == 3


def test_warnings():
    run = config(train={"steps": 5}, optimizer={"warmup_steps": 5}, data={"packing": False, "max_length": 200})
    shown = "\n".join(warn_run(run, shape()))
    for key in ("data.max_length 200", "data.packing", "optimizer.warmup_steps 5"):
        assert key in shown
    assert warn_run(config(data={"max_length": 128}), shape()) == []


def test_planning_imports_no_torch():
    code = "import sys, megatron_klear.config.plan, megatron_klear.config.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_resume_refuses_what_changes_the_run_and_tells_the_rest(tmp_path):
    old = config()
    write_resolved(old, tmp_path / "config.toml")
    assert check_resume(tmp_path / "config.toml", old) == ([], [])
    changed = config(train={"rows_per_step": 4}, optimizer={"learning_rate": 1.0})
    errors, warnings = check_resume(tmp_path / "config.toml", changed)
    assert len(errors) == len(warnings) == 1
    assert "train.rows_per_step: 8 -> 4" in errors[0]
    assert "another output" in errors[0]
    assert "optimizer.learning_rate: 8e-05 -> 1.0" in warnings[0]
