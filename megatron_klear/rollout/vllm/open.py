"""Opens the rollout engine of a run with `[rollout] kind = "vllm"`: servers, transport, engine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.distributed.exchange import from_first_rank
from megatron_klear.rollout.vllm.engine import VLLMEngine
from megatron_klear.rollout.weights.base import open_transport

if TYPE_CHECKING:
    from megatron_klear.config.rl import GPPOConfig
    from megatron_klear.models.architecture import Architecture
    from megatron_klear.rollout.servers.servers import Servers

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_vllm(
    config: GPPOConfig,
    architecture: Architecture,
    *,
    decode: Callable[[Sequence[int]], str],
    stop_token_ids: Iterable[int],
    device: torch.device,
    rank: int,
    world_size: int,
) -> VLLMEngine:
    """The engine on `rollout.servers`, or on servers that rank 0 starts here. Collective.

    Raises UserError on every rank where a server does not start or the transport cannot work.
    """
    rollout = config.rollout
    assert isinstance(rollout, VLLMRolloutConfig)
    dtype = _DTYPES[config.model.dtype if rollout.server.dtype == "model" else rollout.server.dtype]
    started: list[Servers] = []

    def addresses() -> list[str]:
        if rollout.servers:
            return list(rollout.servers)
        started.append(_start_servers(config, rollout, architecture, key))
        return list(started[0].addresses)

    # Whoever reaches a server can replace its weights and, with cuda_ipc, run code in it, other users of this machine
    # included: servers without a key of the user's get one that nobody else knows. It is in no log and on no command
    # line, and not in this process's environment either, which workers inherit.
    key = os.environ.get(rollout.api_key_variable) or (None if rollout.servers else secrets.token_urlsafe(32))
    found = from_first_rank(addresses)
    servers = started[0] if started else None
    try:
        transport = open_transport(rollout, dtype=dtype, device=device, rank=rank, world_size=world_size)
        return VLLMEngine(
            rollout,
            found,
            transport,
            decode=decode,
            stop_token_ids=stop_token_ids,
            vocab_size=architecture.vocab_size,
            dtype=dtype,
            rank=rank,
            api_key=key,
            servers=servers,
        )
    except BaseException:
        if servers is not None:
            servers.close()
        raise


def _start_servers(
    config: GPPOConfig, rollout: VLLMRolloutConfig, architecture: Architecture, key: str | None
) -> Servers:
    from megatron_klear.rollout.servers.command import run_commands
    from megatron_klear.rollout.servers.servers import Servers, choose_ports

    server = rollout.server
    servers = Servers(
        run_commands(config, architecture, choose_ports(server.port, server.count), api_key=key),
        folder=config.output / "servers",
        startup_seconds=server.startup_seconds,
        max_restarts=server.max_restarts,
    )
    servers.start()
    return servers
