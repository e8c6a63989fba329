"""One running vLLM server for the tests of a session, with a tiny model that its attention on the CPU can compute.

The environment that vLLM lives in is named by KLEAR_VLLM_PYTHON; `bash tools/make_vllm_env.sh --cpu DIR` makes it.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_klear.config.base import ModelConfig
from megatron_klear.config.rollout import ServerConfig, VLLMRolloutConfig
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.models.architecture import read_architecture
from megatron_klear.models.peft import AdapterForm
from megatron_klear.rollout.servers.command import server_command
from megatron_klear.rollout.servers.servers import Servers, choose_ports
from megatron_klear.types import Prompt

SHAPE = TinyShape(hidden_size=128, ffn_hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
TIED_SHAPE = replace(SHAPE, tied_embeddings=True)
LONGEST_SEQUENCE = 512


def prompts(*sizes: int) -> list[Prompt]:
    """One of each size, the same every time, so that a cache of prompts is in use."""
    generator = np.random.default_rng(0)
    return [
        Prompt(
            id=f"p{index}",
            data_source="test",
            tokens=generator.integers(0, 500, size=size).astype(np.int32),
            text="",
            ground_truth="",
        )
        for index, size in enumerate(sizes)
    ]


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A healthy server that has loaded the weights in `model`, and keeps what tests send it since."""

    address: str
    model: Path
    shape: TinyShape
    config: VLLMRolloutConfig
    servers: Servers


def vllm_python() -> Path | None:
    """Python of vLLM's environment, None where there is none."""
    named = os.environ.get("KLEAR_VLLM_PYTHON", "")
    return Path(named) if named and os.access(named, os.X_OK) else None


def why_absent() -> str:
    """Why tests that need vLLM are skipped; empty where they are not."""
    if vllm_python():
        return ""
    return f"no vLLM environment: KLEAR_VLLM_PYTHON={os.environ.get('KLEAR_VLLM_PYTHON', '')} names no program"


def rollout_config(**settings: object) -> VLLMRolloutConfig:
    """`[rollout]` for tests on the CPU; `settings` are those of its table."""
    python = vllm_python()
    assert python, why_absent()
    server = ServerConfig(python=python, device="cpu", kv_cache_gib=1 / 16, max_sequences=64, startup_seconds=400)
    return VLLMRolloutConfig.model_validate({"server": server.model_dump()} | settings)


@contextlib.contextmanager
def running_server(
    folder: Path,
    shape: TinyShape = SHAPE,
    *,
    model: Path | None = None,
    longest_sequence: int = LONGEST_SEQUENCE,
    routes: bool = False,
    adapter: AdapterForm | None = None,
) -> Iterator[RunningServer]:
    """Serve `model`, or one of `shape` written into `folder`, in fp32 until the block ends; with its `routes`.

    With `adapter` it takes those of that form.
    """
    model = model or write_tiny_model(folder / "model", "qwen3", shape)
    config = rollout_config()
    command = server_command(
        config,
        ModelConfig(path=model, dtype="fp32"),
        read_architecture(model),
        longest_sequence=longest_sequence,
        device="cpu",
        port=choose_ports(0, 1)[0],
        routes=routes,
        adapter=adapter,
    )
    servers = Servers([command], folder=folder / "servers", startup_seconds=config.server.startup_seconds)
    servers.start()
    try:
        yield RunningServer(address=command.address, model=model, shape=shape, config=config, servers=servers)
    finally:
        servers.close()
