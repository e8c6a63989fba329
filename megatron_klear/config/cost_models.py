"""Shapes and devices that a cost model is asked about: published configurations and makers' data sheets.

Nothing here was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_klear.models.architecture import Architecture, Experts, architecture_from_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A decoder to plan for. `architecture` is what one token goes through: its MLP is that of the chosen experts."""

    name: str
    architecture: Architecture
    experts: Experts | None = None

    @property
    def router_parameters(self) -> int:
        """Of one layer."""
        return self.experts.count * self.architecture.hidden_size if self.experts else 0

    def expert_parameters(self, count: float) -> int:
        """Of `count` experts of one layer."""
        if self.experts is None:
            return 0
        return round(count * 3 * self.architecture.hidden_size * self.experts.ffn_hidden_size)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets."""
        return self.architecture.num_parameters + self.architecture.num_layers * self.router_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        unused = self.expert_parameters(self.experts.count - self.experts.chosen) if self.experts else 0
        return self.active_parameters + self.architecture.num_layers * unused


def model_from_config(name: str, config: dict[str, Any]) -> Model:
    """A model of a parsed `config.json`."""
    architecture = architecture_from_config(config, source=name)
    experts = architecture.experts
    if experts is not None:
        met = experts.chosen * experts.ffn_hidden_size
        architecture = replace(architecture, ffn_hidden_size=met, experts=None)
    return Model(name=name, architecture=architecture, experts=experts)


_QWEN3 = {
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8}


def _qwen3(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **more: object) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        **_QWEN3,
        **more,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "8B": _qwen3(36, 4096, 32, 8, 12_288),
    "32B": _qwen3(64, 5120, 64, 8, 25_600),
    "30B-A3B": _qwen3(48, 2048, 32, 4, 6144, model_type="qwen3_moe", moe_intermediate_size=768, **_EXPERTS),
    "235B-A22B": _qwen3(94, 4096, 64, 4, 12_288, model_type="qwen3_moe", moe_intermediate_size=1536, **_EXPERTS),
}
"""The numbers of the config.json of Qwen3-8B, Qwen3-32B, Qwen3-30B-A3B and Qwen3-235B-A22B on Hugging Face."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What a card and its links do, each way, at their peak, and the share of it that is reckoned with.

    The shares are assumptions to be set, not measurements: put in what your own cluster shows.
    """

    name: str
    peak_flops: float
    """Dense bf16, a second."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes a second."""
    node_bandwidth: float
    """Bytes a second that one card sends within its node."""
    network_bandwidth: float
    """Bytes a second that one card sends to other nodes."""
    cards_of_node: int = 8
    matrix_share: float = 0.6
    link_share: float = 0.8
    memory_share: float = 0.7

    def link(self, ranks: int) -> float:
        """Bytes a second that a card sends in a group that spans `ranks` neighbouring cards."""
        peak = self.node_bandwidth if ranks <= self.cards_of_node else self.network_bandwidth
        return peak * self.link_share


def _hopper(name: str, gib: float, memory_bandwidth: float) -> Device:
    return Device(
        name=name,
        peak_flops=989.4e12,
        memory_bytes=gib * 2**30,
        memory_bandwidth=memory_bandwidth,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
    )


DEVICES = {"H100": _hopper("H100 SXM", 79.6, 3.35e12), "H200": _hopper("H200 SXM", 139.8, 4.8e12)}
"""NVIDIA's data sheets: bf16 without sparsity, NVLink 900 GB/s both ways together; a 400 Gbit/s network card for each
GPU, as in a DGX. Memory is what the driver leaves of 80 and 141 GB."""
