"""What speaks against a run's sampler, its servers above all, found before anything is started. Imports no torch."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_klear.config.base import ModelConfig
from megatron_klear.config.checks_lora import adapter_sent
from megatron_klear.config.placement import check_cards, check_local, check_modes
from megatron_klear.config.rollout import ServerConfig, VLLMRolloutConfig
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.peft import AdapterForm

if TYPE_CHECKING:
    from megatron_klear.config.rl import GPPOConfig

Device = Literal["cpu", "cuda"]

CPU_KV_CACHE_GIB = 1.0
"""Memory of a server's cache on the CPU where `kv_cache_gib` is not given."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be (0.32)."""
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention on the CPU knows (0.32)."""


def check_rollout(
    config: GPPOConfig, architecture: Architecture, world_size: int, *, gpu_bytes: int | None = None
) -> list[str]:
    """Whether sampler and trainer of `world_size` processes can be where they are told to be, and servers start.

    `gpu_bytes` is the memory of one card, None where there is none. Servers that others start are not looked at.
    """
    rollout = config.rollout
    errors = _check_adapters(config, architecture)
    if not isinstance(rollout, VLLMRolloutConfig):
        return errors + check_local(config, architecture, world_size, gpu_bytes, os.environ)
    errors += check_modes(config) + _check_routes(config)
    if rollout.servers:
        return errors
    errors += check_servers(config, architecture)
    if server_device(config) == "cuda" and config.parallel.device != "cpu":
        errors += check_cards(rollout, server_gpus(rollout.server, os.environ), world_size, os.environ)
    return errors


def lacking_for_rollout(config: GPPOConfig) -> list[str]:
    """Those of `check_rollout` that are of this machine alone: programs and keys that another may have."""
    rollout = config.rollout
    if not isinstance(rollout, VLLMRolloutConfig) or rollout.servers:
        return []
    return [*_check_environment(rollout.server), *_check_access(rollout)]


def check_servers(config: GPPOConfig, architecture: Architecture) -> list[str]:
    """Everything that keeps the servers of `[rollout.server]` from starting on this machine."""
    rollout = config.rollout
    if not isinstance(rollout, VLLMRolloutConfig):
        return [f'rollout.kind = {rollout.kind} has no servers; set [rollout] kind = "vllm"']
    server, device = rollout.server, server_device(config)
    errors = [*_check_environment(server), *_check_access(rollout)]
    length, limit = longest_sequence(config), architecture.max_positions
    if length > limit:
        errors.append(
            f"prompts.max_tokens with sampling.max_tokens is {length} tokens, above the model's "
            f"max_position_embeddings {limit}, which vLLM refuses; lower them or extend its RoPE (rope_scaling in "
            "config.json)"
        )
    if server.port and server.port + server.count - 1 > 65535:
        errors.append(f"rollout.server.port {server.port} leaves no ports for rollout.server.count {server.count}")
    if device == "cpu":
        errors += _check_cpu(rollout, architecture)
    else:
        errors += _check_gpus(server, architecture, os.environ)
    if device == "cpu" or server.kv_cache_gib is not None:
        dtype = config.model.dtype if server.dtype == "model" else server.dtype
        errors += _check_cache(server, dtype, architecture, length)
    return errors


def _check_routes(config: GPPOConfig) -> list[str]:
    """What keeps servers from telling the experts of each token, whoever starts them."""
    rollout, key = config.rollout, "algorithm.router_replay = sampler"
    if config.algorithm.router_replay != "sampler" or not isinstance(rollout, VLLMRolloutConfig):
        return []
    errors = []
    on_cpu = server_device(config) == "cpu"
    if on_cpu and rollout.router is not None:
        errors.append(
            f"{key} asks a server on the CPU for its routes behind its answer, and behind rollout.router nobody knows "
            "which one answered; leave out rollout.router, or use servers on GPUs"
        )
    if on_cpu and "--enable-prefix-caching" in rollout.server.arguments:
        errors.append(
            f"{key} needs a server on the CPU to read every token of a prompt, and rollout.server.arguments has "
            "--enable-prefix-caching; leave it out"
        )
    if not on_cpu and "--no-enable-prefix-caching" in rollout.server.arguments:
        errors.append(
            f"{key} needs vLLM's prefix caching (0.32 keeps routes beside its blocks), and rollout.server.arguments "
            "has --no-enable-prefix-caching; leave it out"
        )
    return errors


def _check_adapters(config: GPPOConfig, architecture: Architecture) -> list[str]:
    """What keeps samplers from being sent adapters alone."""
    rollout, lora, model = config.rollout, config.lora, config.model
    if lora is None or lora.sync != "adapter":
        return []
    if not isinstance(rollout, VLLMRolloutConfig):
        return [
            'lora.sync = adapter sends adapters to vLLM servers, and rollout.kind = "local" draws from whole weights; '
            "set lora.sync to merged"
        ]
    errors = []
    if rollout.transfer in ("cuda_ipc", "nccl"):
        errors.append(
            f"lora.sync = adapter sends files, and rollout.transfer = {rollout.transfer} does not; use shared_memory, "
            "or disk where servers run on another host"
        )
    if model.weights != "pretrained" or model.checkpoint is not None:
        told = f"model.checkpoint = {model.checkpoint}" if model.checkpoint else f"model.weights = {model.weights}"
        errors.append(
            f"lora.sync = adapter has servers read the base from model.path, and {told} is another one; set lora.sync "
            "to merged, or export the base first"
        )
    if lora.rank > LORA_RANKS[-1]:
        errors.append(
            f"lora.sync = adapter: vLLM takes adapters up to rank {LORA_RANKS[-1]} (0.32), and lora.rank is "
            f"{lora.rank}; set lora.sync to merged"
        )
    if architecture.experts is not None:
        errors.append(
            f"lora.sync = adapter is not supported for the {architecture.family} model: vLLM would put adapters on its "
            "experts too; set lora.sync to merged"
        )
    return errors


def _check_environment(server: ServerConfig) -> list[str]:
    if os.access(server.python, os.X_OK):
        return []
    return [
        f"rollout.server.python {server.python}: there is no such program; make vLLM's environment with "
        f"`bash tools/make_vllm_env.sh {server.python.parent.parent}` (--cpu without a GPU), or name one that exists"
    ]


def _check_access(rollout: VLLMRolloutConfig) -> list[str]:
    if is_loopback(rollout.server.host) or os.environ.get(rollout.api_key_variable):
        return []
    return [
        f"rollout.server.host {rollout.server.host} lets other machines replace the weights: put an API key in the "
        f"environment variable {rollout.api_key_variable}, the same for servers and trainer, or listen on 127.0.0.1"
    ]


def _check_cpu(rollout: VLLMRolloutConfig, architecture: Architecture) -> list[str]:
    errors = []
    if rollout.transfer in ("cuda_ipc", "nccl"):
        errors.append(f"rollout.transfer = {rollout.transfer} needs servers on GPUs; use shared_memory or disk")
    if architecture.head_dim not in CPU_HEAD_DIMS:
        errors.append(
            f"the model's head_dim {architecture.head_dim} is none that vLLM computes on the CPU "
            f'({", ".join(map(str, CPU_HEAD_DIMS))}); take another model or rollout.kind = "local"'
        )
    return errors


def _check_gpus(server: ServerConfig, architecture: Architecture, environment: Mapping[str, str]) -> list[str]:
    errors = []
    needed, gpus = server.count * server.tensor_parallel, server_gpus(server, environment)
    if len(gpus) < needed:
        named = "rollout.server.devices names" if server.devices else "CUDA_VISIBLE_DEVICES names"
        errors.append(
            f"{named} {len(gpus)} GPUs, and rollout.server.count {server.count} x tensor_parallel "
            f"{server.tensor_parallel} needs {needed}"
        )
    if architecture.num_heads % server.tensor_parallel:
        errors.append(
            f"rollout.server.tensor_parallel {server.tensor_parallel} does not divide the model's "
            f"num_attention_heads {architecture.num_heads}"
        )
    return errors


def _check_cache(server: ServerConfig, dtype: str, architecture: Architecture, length: int) -> list[str]:
    """`dtype` is the one that the server really has."""
    gib = server.kv_cache_gib or CPU_KV_CACHE_GIB
    element_bytes = 4 if dtype == "fp32" else 2
    heads = -(-architecture.num_kv_heads // server.tensor_parallel)
    token_bytes = 2 * architecture.num_layers * heads * architecture.head_dim * element_bytes
    needed = length * token_bytes / 2**30
    if needed <= gib:
        return []
    return [
        f"rollout.server.kv_cache_gib {gib:g} does not hold one sequence of {length} tokens, which takes "
        f"{needed:.2f} GiB; give it some of these times as much as sequences are to be decoded at once"
    ]


def server_device(config: GPPOConfig) -> Device:
    """Where the servers run: as told, else where the trainer is told to, else on GPUs if there are any."""
    rollout = config.rollout
    assert isinstance(rollout, VLLMRolloutConfig)
    for told in (rollout.server.device, config.parallel.device):
        if told != "auto":
            return told
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    return "cpu" if subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode else "cuda"


def server_gpus(server: ServerConfig, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of all servers: as told, else those visible to this process, else the first ones."""
    if server.devices:
        return tuple(map(str, server.devices))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return tuple(name.strip() for name in visible.split(","))
    return tuple(map(str, range(server.count * server.tensor_parallel)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What the servers of a run hold, and where."""

    model: ModelConfig
    architecture: Architecture
    longest_sequence: int
    """Tokens of prompt and response together."""
    device: Device
    seed: int
    routes: bool = False
    """Whether they tell the experts that each token went through."""
    adapter: AdapterForm | None = None
    """Of the adapters that they are sent; None where they are sent whole weights."""

    @classmethod
    def by(cls, config: GPPOConfig, architecture: Architecture) -> Served:
        """Those of a run, which must have passed `check_servers`."""
        return cls(
            model=config.model,
            architecture=architecture,
            longest_sequence=longest_sequence(config),
            device=server_device(config),
            seed=config.seed,
            routes=config.algorithm.router_replay == "sampler",
            adapter=adapter_sent(config.lora, architecture),
        )


def longest_sequence(config: GPPOConfig) -> int:
    """Tokens of the longest prompt and response that the run may ask for."""
    validation = config.validation.sampling.max_tokens if config.validation.sources else 0
    return config.prompts.max_tokens + max(config.sampling.max_tokens, validation)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
