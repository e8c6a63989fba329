"""Opens the rollout engine of a run with `[rollout] kind = "vllm"`: servers and engine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.rollout.vllm.engine import Courier, VLLMEngine

if TYPE_CHECKING:
    from megatron_klear.config.rl import GPPOConfig
    from megatron_klear.models.architecture import Architecture
    from megatron_klear.rollout.servers.servers import Servers


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Where servers are, and the key of requests to them."""

    addresses: tuple[str, ...]
    api_key: str | None = field(repr=False)


def open_vllm(
    config: GPPOConfig,
    architecture: Architecture,
    courier: Courier,
    *,
    decode: Callable[[Sequence[int]], str],
    stop_token_ids: Iterable[int],
) -> tuple[VLLMEngine, Access]:
    """The engine on `rollout.servers`, or on servers that are started here, and how the trainer reaches them.

    Raises UserError where a server does not start.
    """
    rollout = config.rollout
    assert isinstance(rollout, VLLMRolloutConfig)
    # Whoever reaches a server can replace its weights and, with cuda_ipc, run code in it, other users of this machine
    # included: servers without a key of the user's get one that nobody else knows. It is in no log and on no command
    # line, and not in this process's environment either, which workers inherit.
    key = os.environ.get(rollout.api_key_variable) or (None if rollout.servers else secrets.token_urlsafe(32))
    servers = None if rollout.servers else _start_servers(config, rollout, architecture, key)
    addresses = rollout.servers if servers is None else servers.addresses
    try:
        engine = VLLMEngine(
            rollout,
            addresses,
            courier,
            decode=decode,
            stop_token_ids=stop_token_ids,
            vocab_size=architecture.vocab_size,
            api_key=key,
            servers=servers,
        )
    except BaseException:
        if servers is not None:
            servers.close()
        raise
    return engine, Access(addresses=tuple(addresses), api_key=key)


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
