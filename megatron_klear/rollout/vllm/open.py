"""Opens the rollout engine of a run with `[rollout] kind = "vllm"`: servers and engine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.rollout.vllm.client import ADAPTER_NAME
from megatron_klear.rollout.vllm.engine import Courier, VLLMEngine
from megatron_klear.rollout.vllm.routes import RouteForm

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_klear.config.checks_rollout import Served
    from megatron_klear.rollout.servers.servers import Servers


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Where servers are, and the key of requests to them."""

    addresses: tuple[str, ...]
    api_key: str | None = field(repr=False)


def open_vllm(
    rollout: VLLMRolloutConfig,
    served: Served,
    courier: Courier,
    *,
    decode: Callable[[Sequence[int]], str],
    stop_token_ids: Iterable[int],
    logs: Path,
) -> tuple[VLLMEngine, Access]:
    """The engine on `rollout.servers`, or on servers that are started here, and how the trainer reaches them.

    Servers that are started write their logs into the folder `logs`.
    Raises UserError where a server does not start.
    """
    # Whoever reaches a server can replace its weights and, with cuda_ipc, run code in it, other users of this machine
    # included: servers without a key of the user's get one that nobody else knows. It is in no log and on no command
    # line, and not in this process's environment either, which workers inherit.
    key = os.environ.get(rollout.api_key_variable) or (None if rollout.servers else secrets.token_urlsafe(32))
    servers = None if rollout.servers else _start_servers(rollout, served, logs, key)
    addresses = rollout.servers if servers is None else servers.addresses
    try:
        engine = VLLMEngine(
            rollout,
            addresses,
            courier,
            decode=decode,
            stop_token_ids=stop_token_ids,
            vocab_size=served.architecture.vocab_size,
            routes=RouteForm.of(served.architecture, kept_by_worker=served.device == "cpu") if served.routes else None,
            model=ADAPTER_NAME if served.adapter is not None else None,
            api_key=key,
            servers=servers,
        )
    except BaseException:
        if servers is not None:
            servers.close()
        raise
    return engine, Access(addresses=tuple(addresses), api_key=key)


def _start_servers(rollout: VLLMRolloutConfig, served: Served, logs: Path, key: str | None) -> Servers:
    from megatron_klear.rollout.servers.command import run_commands
    from megatron_klear.rollout.servers.servers import Servers, choose_ports

    server = rollout.server
    servers = Servers(
        run_commands(rollout, served, choose_ports(server.port, server.count), api_key=key),
        folder=logs,
        startup_seconds=server.startup_seconds,
        max_restarts=server.max_restarts,
    )
    servers.start()
    return servers
