"""The model's shape, read from a Hugging Face `config.json` and never typed in by hand.

Decoder families are those of `families.py`: Qwen3 and Qwen3-MoE, Qwen2/2.5 and Llama (SmolLM2 and the R1 distillations
are among them). What a config asks for and this project does not compute (sliding windows, dense layers among those
with experts, attention biases of Llama) is an error, not an approximation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.models.families import FAMILIES
from megatron_klear.models.family import Family
from megatron_klear.models.rope import ArchitectureError, Rope, read_rope

__all__ = ["Architecture", "ArchitectureError", "Experts", "Rope", "architecture_from_config", "read_architecture"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture of experts in place of every layer's MLP: a softmax router that sends a token to some of them."""

    count: int
    chosen: int
    """Experts that one token goes through, of the largest router probabilities."""
    ffn_hidden_size: int
    """Of one expert."""
    normalised: bool
    """Whether the probabilities of the chosen ones are divided by their sum (`norm_topk_prob`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Shape of one decoder. Counts are of the whole model, not of a rank."""

    family: str
    """`model_type` of the config.json; see `families.FAMILIES`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of the MLP; read by nobody where there are experts."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    experts: Experts | None = None

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Vocabulary rows held over all tensor ranks: a multiple of `tensor_parallel`, extra rows zero."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    @property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * q + 2 * kv) + (q + 2 * kv if self.qkv_bias else 0)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return attention + self.mlp_parameters + norms

    @property
    def mlp_parameters(self) -> int:
        """Parameters of a layer's MLP, or of its router and all its experts."""
        if self.experts is None:
            return 3 * self.hidden_size * self.ffn_hidden_size
        return self.router_parameters + self.experts.count * self.expert_parameters

    @property
    def router_parameters(self) -> int:
        """Parameters of one layer's router, 0 without experts."""
        return self.experts.count * self.hidden_size if self.experts else 0

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, 0 where there is none."""
        return 3 * self.hidden_size * self.experts.ffn_hidden_size if self.experts else 0

    @property
    def unused_parameters(self) -> int:
        """Parameters of the whole model that one token does not meet: the experts that it is not sent to."""
        if self.experts is None:
            return 0
        return self.num_layers * (self.experts.count - self.experts.chosen) * self.expert_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, a tied head counted once and vocabulary padding not at all."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * self.layer_parameters + self.hidden_size

    def flops_per_token(self, context: float) -> float:
        """Forward and backward FLOPs of a token whose causal attention reads `context` tokens on average.

        Six per weight of a matrix that it meets (of experts the chosen ones), and 12 * layers * heads * head_dim *
        context for the scores and their values (PaLM, appendix B). Recomputation is not counted: this is model
        FLOPs, as in MFU.
        """
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * q + 2 * kv) + self.mlp_parameters
        matrices = self.num_layers * layer - self.unused_parameters + self.vocab_size * self.hidden_size
        return 6.0 * matrices + 12.0 * self.num_layers * q * context


def read_architecture(folder: Path) -> Architecture:
    """Read `folder/config.json`.

    Raises ArchitectureError naming the file and the key when it is missing, malformed or unsupported.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ArchitectureError(
            f"{path} does not exist: model.path must be a Hugging Face model folder (config.json, tokenizer, weights)"
        ) from None
    except json.JSONDecodeError as error:
        raise ArchitectureError(f"{path} is not valid JSON: {error}") from None
    return architecture_from_config(config, source=str(path))


def architecture_from_config(config: dict[str, Any], source: str = "config.json") -> Architecture:
    """Build the shape from a parsed `config.json`; `source` names it in errors."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ArchitectureError(
            f"{source}: model_type {config.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )

    def number(key: str) -> Any:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArchitectureError(f"{source}: {key} is {value!r}, expected a number")
        return value

    _refuse_unsupported(config, family, source)
    heads = int(number("num_attention_heads"))
    kv_heads = config.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else int(kv_heads)
    hidden = int(number("hidden_size"))
    head_dim = config.get("head_dim")
    head_dim = hidden // heads if head_dim is None else int(head_dim)
    if heads % kv_heads:
        raise ArchitectureError(
            f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return Architecture(
        family=family.model_type,
        num_layers=int(number("num_hidden_layers")),
        hidden_size=hidden,
        ffn_hidden_size=int(number("intermediate_size")),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=int(number("vocab_size")),
        max_positions=int(number("max_position_embeddings")),
        norm_eps=float(number("rms_norm_eps")),
        rope=read_rope(config, source),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        experts=_experts(config, number, source) if family.experts else None,
    )


def _experts(config: dict[str, Any], number: Callable[[str], Any], source: str) -> Experts:
    """Published configs say `num_experts`, transformers 5 saves it as `num_local_experts`."""
    experts = Experts(
        count=int(number("num_experts" if "num_experts" in config else "num_local_experts")),
        chosen=int(number("num_experts_per_tok")),
        ffn_hidden_size=int(number("moe_intermediate_size")),
        normalised=bool(config.get("norm_topk_prob", False)),
    )
    if not 1 <= experts.chosen <= experts.count:
        raise ArchitectureError(f"{source}: num_experts_per_tok {experts.chosen} of {experts.count} experts")
    return experts


def _refuse_unsupported(config: dict[str, Any], family: Family, source: str) -> None:
    if config.get("use_sliding_window"):
        raise ArchitectureError(f"{source}: use_sliding_window is not supported; set it to false")
    if config.get("hidden_act", "silu") != "silu":
        raise ArchitectureError(f"{source}: hidden_act {config['hidden_act']!r} is not supported, expected 'silu'")
    if reason := family.why_refused(config):
        raise ArchitectureError(f"{source}: {reason}")
    if config.get("mlp_bias"):
        raise ArchitectureError(f"{source}: mlp_bias true is not supported")
