"""`[rollout]`: where responses are drawn, in the training processes or by vLLM servers. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from megatron_klear.config.base import Settings


class LocalRolloutConfig(Settings):
    """`[rollout] kind = "local"`: in-process sampling with a KV cache."""

    kind: Literal["local"] = "local"
    max_sequences: PositiveInt = 64
    """Sequences decoded at once on one rank."""
    dtype: Literal["model", "fp32"] = "model"
    """Precision of the sampler's weights and cache."""


class ServerConfig(Settings):
    """`[rollout.server]`: the vLLM servers that the run or `tools/serve_rollouts.py` starts."""

    python: Path = Path("vllm-env/bin/python")
    """Python of the environment that `tools/make_vllm_env.sh` made; the trainer's own has no vLLM."""
    count: PositiveInt = 1
    """Servers to start on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: tuple[int, ...] = ()
    """GPUs of the servers, `tensor_parallel` for each in order; empty leaves it to CUDA_VISIBLE_DEVICES."""
    tensor_parallel: PositiveInt = 1
    """GPUs of one server."""
    dtype: Literal["model", "fp32", "bf16", "fp16"] = "model"
    """Precision of the sampler's weights and cache; `model` is the trainer's `model.dtype`."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory of one server's KV cache; unset is `memory_share` of the card, and 1 GiB on the CPU."""
    memory_share: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU that a server may fill, weights and cache."""
    max_sequences: PositiveInt = 256
    """Sequences that one server decodes at once; requests in its hands are fewer where its cache holds fewer."""
    eager: bool | None = None
    """No compilation and no CUDA graphs; unset is true on the CPU, where compiling costs a minute."""
    host: str = "127.0.0.1"
    """Interface to listen on. Whoever reaches it can replace the weights: give another than loopback only together
    with an API key in the variable `rollout.api_key_variable`."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the first server, counting up; 0 takes free ones."""
    startup_seconds: float = Field(default=600, gt=0)
    """Longest wait until a started server is healthy."""
    max_restarts: int = Field(default=10, ge=0)
    """Restarts of one server without a response in between, after which the run stops."""
    arguments: tuple[str, ...] = ()
    """Further arguments of vLLM's server, as on its command line."""


class VLLMRolloutConfig(Settings):
    """`[rollout] kind = "vllm"`: servers reached over HTTP, token ids in, token ids and log-probs out."""

    kind: Literal["vllm"] = "vllm"
    servers: tuple[str, ...] = ()
    """Addresses of running servers, `http://host:port`; empty: the run starts `server.count` of its own."""
    router: str | None = None
    """Address of a vllm-router that spreads the requests over `servers`; weights still go to each of them."""
    api_key_variable: str = "KLEAR_ROLLOUT_API_KEY"
    """Environment variable that holds the servers' API key, where they have one."""
    transfer: Literal["shared_memory", "cuda_ipc", "nccl", "disk"] = "shared_memory"
    """How weights reach the servers: a file in memory (same host), CUDA IPC (same card), NCCL (other cards and hosts),
    or a file in `transfer_folder` on a disk that both see."""
    transfer_folder: Path | None = None
    """Folder of the files; needed for `disk`, /dev/shm for `shared_memory`."""
    bucket_bytes: PositiveInt = 1 << 30
    """Most bytes of weights on their way at once."""
    mode: Literal["synchronous", "one_step_off", "asynchronous"] = "synchronous"
    """`synchronous`: generate, then train. `one_step_off`: generate step k+1 while step k trains. `asynchronous`:
    generate always; responses under way go on with new weights."""
    max_staleness: PositiveInt = 1
    """Asynchronous: most rollout steps between the oldest policy that drew a token and the one trained."""
    max_groups_in_flight: PositiveInt | None = None
    """Asynchronous: groups under way at once; unset is what the staleness bound allows."""
    request_seconds: float = Field(default=300, gt=0)
    """Longest time that a server with requests draws no token; then they are asked for elsewhere. A response may take
    as long as it takes while its server draws."""
    deadline_seconds: float = Field(default=3600, gt=0)
    """Longest time that a response makes no headway over all servers; then its group is dropped and counted."""
    max_dropped_share: float = Field(default=0.05, ge=0, le=1)
    """The run stops when more than this share of a step's groups was dropped."""
    seed_requests: bool = True
    """Seed every request, so that a server that is asked again draws the same; without it vLLM decodes a few per cent
    faster, and a run with the same `seed` draws other responses each time."""
    probe_tolerance: float | None = Field(default=None, gt=0)
    """Mean difference of log-probs in nats between trainer and server on the probe after each sync; unset goes by
    precision."""
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _check(self) -> VLLMRolloutConfig:
        if self.transfer == "disk" and self.transfer_folder is None:
            raise ValueError("rollout.transfer = disk needs rollout.transfer_folder, on a disk that servers see too")
        if self.router is not None and not self.servers:
            raise ValueError("rollout.router needs rollout.servers: weights are sent to each server itself")
        if self.deadline_seconds < self.request_seconds:
            raise ValueError(
                f"rollout.deadline_seconds {self.deadline_seconds:g} is below rollout.request_seconds "
                f"{self.request_seconds:g}: the first attempt may take longer than all of them"
            )
        return self


def _local_unless_told(table: Any) -> Any:
    return {"kind": "local"} | table if isinstance(table, dict) else table


Rollout = Annotated[
    Annotated[LocalRolloutConfig | VLLMRolloutConfig, Field(discriminator="kind")], BeforeValidator(_local_unless_told)
]
