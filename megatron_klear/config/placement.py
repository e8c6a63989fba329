"""Where sampler and trainer meet on one device, and what cannot work there. Imports no torch.

Cards are compared by the names that CUDA_VISIBLE_DEVICES gives them, or by their numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_klear.config.rollout import LocalRolloutConfig, VLLMRolloutConfig
from megatron_klear.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron_klear.config.rl import GPPOConfig

GIB = 2**30


def trainer_gpus(world_size: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Cards of the trainer's processes on this machine, one each: the first ones that are visible."""
    processes = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else list(map(str, range(processes)))
    return tuple(names[:processes])


def check_modes(config: GPPOConfig) -> list[str]:
    """Transfers that the mode or the trainer's device makes impossible, whoever starts the servers."""
    rollout = config.rollout
    if not isinstance(rollout, VLLMRolloutConfig):
        return []
    errors = []
    if rollout.transfer == "cuda_ipc" and rollout.mode != "synchronous":
        errors.append(
            f"rollout.transfer = cuda_ipc has servers on the trainer's cards, and in rollout.mode = {rollout.mode} "
            "they draw while it trains: neither ever gives its memory to the other. Use synchronous, or servers on "
            "cards of their own with transfer = nccl"
        )
    if rollout.transfer in ("cuda_ipc", "nccl") and config.parallel.device == "cpu":
        errors.append(
            f"rollout.transfer = {rollout.transfer} sends from the trainer's cards, and parallel.device is cpu; use "
            "shared_memory or disk"
        )
    return errors


def check_cards(
    rollout: VLLMRolloutConfig, gpus: tuple[str, ...], world_size: int, environment: Mapping[str, str]
) -> list[str]:
    """Whether the run's own servers on `gpus` and a trainer on cards of this machine leave each other alone."""
    trainer = trainer_gpus(world_size, environment)
    shared = [gpu for gpu in gpus if gpu in trainer]
    if rollout.transfer == "cuda_ipc":
        apart = [gpu for gpu in gpus if gpu not in trainer]
        if not apart:
            return []
        return [
            f"rollout.transfer = cuda_ipc reaches servers on the trainer's cards ({', '.join(trainer)}), and rollout."
            f"server has some on {', '.join(apart)}; name the trainer's in rollout.server.devices, or use nccl"
        ]
    if not shared:
        return []
    if rollout.transfer == "nccl":
        return [
            f"rollout.transfer = nccl needs servers on cards of their own, and GPUs {', '.join(shared)} are the "
            f"trainer's too ({', '.join(trainer)}): name others in rollout.server.devices, start servers elsewhere and "
            "name them in rollout.servers, or share cards with transfer = cuda_ipc"
        ]
    if rollout.server.devices:
        return []  # a card for both, neither of which ever sleeps: as told
    return [
        f"rollout.server.devices is not set, and the servers would take the trainer's GPUs {', '.join(shared)}, where "
        f"they never sleep with transfer = {rollout.transfer}: name their cards, or use cuda_ipc"
    ]


def check_local(
    config: GPPOConfig,
    architecture: Architecture,
    world_size: int,
    gpu_bytes: int | None,
    environment: Mapping[str, str],
) -> list[str]:
    """Whether the local engine's weights and its cache of the longest responses fit a device of `gpu_bytes`.

    Counts responses alone, without prompts and the trainer: what is refused cannot fit. On the CPU the processes of
    this machine share its memory; a card whose memory is not known is not judged.
    """
    rollout, device = config.rollout, config.parallel.device
    if not isinstance(rollout, LocalRolloutConfig):
        return []
    on_cpu = device == "cpu" or (device == "auto" and gpu_bytes is None)
    if on_cpu:
        processes = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
    elif gpu_bytes is not None:
        memory = gpu_bytes
    else:
        return []
    element_bytes = 4 if "fp32" in (rollout.dtype, config.model.dtype) else 2
    prompts = config.algorithm.generated_prompts or config.algorithm.prompts_per_step
    sampling = config.sampling
    rows = min(rollout.max_sequences, -(-prompts // world_size) * sampling.samples_per_prompt)
    token_bytes = 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim * element_bytes
    cache, weights = rows * sampling.max_tokens * token_bytes, architecture.num_parameters * element_bytes
    if cache + weights <= memory:
        return []
    return [
        f'rollout.kind = "local": the cache of {rows} sequences with responses of sampling.max_tokens '
        f"{sampling.max_tokens} takes {cache / GIB:.1f} GiB on each process, beside {weights / GIB:.1f} GiB of "
        f"weights, and there are {memory / GIB:.1f} GiB; lower rollout.max_sequences, or draw with vLLM servers "
        '(kind = "vllm"), which take cache as they need it'
    ]
