"""A Hugging Face shape turned into this rank's chunks of Megatron's GPTModel.

The chunk that holds the head stops at the final norm: it returns hidden states, and the loss (or the log-probs) is
computed from them and `head_weight` by the fused kernel or its reference. Weights are left uninitialised: every
parameter is filled by the strict loader in `hf.py`, or from a checkpoint.
"""

from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_klear.config.base import ModelConfig, RunConfig
from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore import experts
from megatron_klear.mcore.layers import PackedAttention, RMSNorm
from megatron_klear.mcore.lora import adapt_layers
from megatron_klear.mcore.rows import LocalRow
from megatron_klear.mcore.topology import Topology
from megatron_klear.models.architecture import Architecture

device_shim.install()

from megatron.core.models.gpt import GPTModel  # noqa: E402  (the shim must come first)
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns hidden states [T_local (/ tensor size under sequence parallelism), 1, H]."""

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def run(self, row: LocalRow) -> Tensor:
        """One micro-batch, on the device, through this chunk's layers."""
        out: Tensor = self(row.tokens, None, None, packed_seq_params=row.params)
        return out

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """The head's local rows [padded V / tensor size, H], the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            shared: torch.nn.Parameter = self.shared_embedding_or_output_weight()
            return shared
        weight: torch.nn.Parameter = self.output_layer.weight
        return weight

    @property
    def head_is_embedding(self) -> bool:
        """True where the head's parameter is also this very chunk's embedding, so that its gradient has two sources."""
        return bool(self.share_embeddings_and_output_weights and self.pre_process)


def use_transformer_engine(run: RunConfig) -> bool:
    """Whether transformer-engine's layers are built. Raises RuntimeError when asked for and impossible.

    Adapters are on Megatron's own layers: transformer-engine's hide the input of their matrices behind the norm.
    """
    model = run.model
    importable = importlib.util.find_spec("transformer_engine") is not None
    if model.transformer_engine == "on" or model.fp8 != "off":
        wish = 'model.transformer_engine = "on"' if model.transformer_engine == "on" else f'model.fp8 = "{model.fp8}"'
        if not importable:
            raise RuntimeError(f"{wish} but transformer_engine does not import; install megatron-klear[te]")
        if not torch.cuda.is_available():
            raise RuntimeError(f"{wish} needs a CUDA device")
        if model.fp8 != "off":
            _check_recipe(model)
        return True
    return model.transformer_engine == "auto" and run.lora is None and importable and torch.cuda.is_available()


def _check_recipe(model: ModelConfig) -> None:
    """Raise RuntimeError, in transformer-engine's words, where this device or CUDA cannot compute the FP8 recipe."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # where Megatron has it from, in all versions

    manager = FP8GlobalStateManager
    blocks = model.fp8_recipe == "blockwise"
    possible, reason = manager.is_fp8_block_scaling_available() if blocks else manager.is_fp8_available()
    if not possible:
        other = " and model.fp8_recipe = tensorwise may do" if blocks else ""
        raise RuntimeError(f"model.fp8 = {model.fp8} with model.fp8_recipe = {model.fp8_recipe}: {reason}{other}")


def transformer_config(architecture: Architecture, run: RunConfig, topology: Topology) -> TransformerConfig:
    """Megatron's configuration of this model in this layout."""
    dtype, cuda = DTYPES[run.model.dtype], topology.device.type == "cuda"
    interleaved = topology.parallel.virtual_pipeline > 1
    _, attention_scaling = inverse_frequencies(architecture)
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        # YaRN scales cosine and sine alike, so the scores by its square.
        softmax_scale=attention_scaling**2 / math.sqrt(architecture.head_dim),
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tensor.size,
        pipeline_model_parallel_size=topology.pipeline.size,
        virtual_pipeline_model_parallel_size=topology.parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=topology.context.size,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Megatron marks tensor-parallel parameters as it initialises them; the gradient norm needs the marks.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=not cuda,
        # The engine's weights sum to one over the global batch: gradients are summed and never averaged.
        calculate_per_token_loss=True,
        # Rows differ in length, so stages exchange shapes; Megatron allows it only with this dispatcher.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Batched sends of the interleaved schedule pair up wrongly between two ranks, without an error.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        batch_p2p_sync=cuda,
        # What went to the next stage is of use for its graph alone; without this each micro-batch under way keeps it.
        # Not in the interleaved schedule, which frees an output while it is still being sent: the next stage would get
        # whatever comes to lie there.
        deallocate_pipeline_outputs=topology.pipeline.size > 1 and not interleaved,
        gradient_accumulation_fusion=cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        attention_softmax_in_fp32=True,
        transformer_impl="transformer_engine" if use_transformer_engine(run) else "local",
        **(_chosen_options(run) | experts.expert_options(architecture, topology)),
    )


def _chosen_options(run: RunConfig) -> dict[str, Any]:
    """Recomputation and FP8: what Megatron is told only where a run asks for it."""
    options: dict[str, Any] = {}
    if run.model.fp8 != "off":
        options |= {"fp8": run.model.fp8, "fp8_recipe": run.model.fp8_recipe}
    if run.recompute.granularity == "full":
        options |= {
            "recompute_granularity": "full",
            "recompute_method": run.recompute.method,
            "recompute_num_layers": run.recompute.layers,
        }
    elif run.recompute.granularity == "selective":
        if "layernorm" in run.recompute.modules:
            _give_fp8_names()
        options |= {"recompute_granularity": "selective", "recompute_modules": list(run.recompute.modules)}
    return options


def _give_fp8_names() -> None:
    """Let norms be recomputed without transformer-engine: Megatron asks it then whether FP8 is on, installed or not."""
    from megatron.core.tensor_parallel import random

    if not random.HAVE_TE:
        random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
        random.activation_recompute_forward = random.fp8_autocast = lambda **_: nullcontext()


def _leave(tensor: Tensor) -> Tensor:
    """Initialise nothing."""
    return tensor


def build_chunks(architecture: Architecture, run: RunConfig, topology: Topology) -> list[PolicyModel]:
    """This rank's chunks (one, or one per virtual stage) on the device, parameters uninitialised."""
    config = transformer_config(architecture, run, topology)
    engine = use_transformer_engine(run)
    count = topology.parallel.virtual_pipeline
    chunks = []
    for stage in range(count):
        first = topology.pipeline.first and stage == 0
        last = topology.pipeline.last and stage == count - 1
        block = _block_spec(architecture, run.model, config, engine, stage if count > 1 else None)
        if run.lora is not None:
            adapt_layers(block, architecture, run.lora, topology.tensor.size)
        chunk = PolicyModel(
            config,
            block,
            vocab_size=architecture.padded_vocab_size(topology.tensor.size),
            max_sequence_length=architecture.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="none",  # PackedAttention applies the rotary embedding
            vp_stage=stage if count > 1 else None,
        )
        experts.mark_experts(chunk)
        chunks.append(chunk.to(topology.device))
    return chunks


def inverse_frequencies(architecture: Architecture) -> tuple[Tensor, float]:
    """Rotary inverse frequencies [head_dim / 2] in fp32, and the factor on cosine and sine (1 but for YaRN).

    The scaled kinds are computed by transformers' own functions.
    """
    rope = architecture.rope
    if rope.kind == "default":
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
        return 1.0 / rope.theta**exponents, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=architecture.num_heads * architecture.head_dim,
        num_attention_heads=architecture.num_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        rope_parameters={"rope_type": rope.kind, "rope_theta": rope.theta, **dict(rope.parameters)},
    )
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    return frequencies.float(), float(scaling)


def _block_spec(
    architecture: Architecture, model: ModelConfig, config: TransformerConfig, engine: bool, stage: int | None
) -> TransformerBlockSubmodules:
    if engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=architecture.qk_norm, num_experts=config.num_moe_experts, moe_grouped_gemm=True
        )
        if architecture.experts is not None:
            # A norm of its own before experts; in checkpoints it has the name that Megatron's local layers give it.
            names = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
            spec.submodules.sharded_state_dict_keys_map = spec.submodules.sharded_state_dict_keys_map | names
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=architecture.qk_norm, normalization="RMSNorm", num_experts=config.num_moe_experts
        )
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        if architecture.qk_norm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if architecture.experts is not None:
        experts.route(spec, model)
    spec.submodules.self_attention.submodules.core_attention = partial(PackedAttention, attention=model.attention)
    if engine:
        from megatron.core.extensions.transformer_engine import TENorm as final_norm
    else:
        final_norm = RMSNorm
    layers = [spec] * get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)
