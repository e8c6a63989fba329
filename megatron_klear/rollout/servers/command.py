"""The command line and the environment of one vLLM server, from a run's settings; nothing is started here."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_klear.config.base import ModelConfig
from megatron_klear.config.checks_rollout import CPU_KV_CACHE_GIB, LORA_RANKS, Device, Served, server_gpus
from megatron_klear.config.rollout import ServerConfig, VLLMRolloutConfig
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.peft import AdapterForm

SERVED_NAME = "policy"
"""Name of the model in requests."""
GUARD = "megatron_klear.rollout.servers.guard.RequireKey"
ROOT = Path(__file__).resolve().parents[3]

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What torchrun and the trainer's own environment say is not true of a server; vLLM's sleep refuses expandable segments.
_TRAINERS_OWN = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "VLLM_API_KEY"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCommand:
    """One server: what to run, the variables that are set for it, and where it will listen."""

    arguments: tuple[str, ...]
    variables: Mapping[str, str] = field(repr=False)  # the key is among them
    """Set on top of what the caller's environment hands on."""
    dropped: tuple[str, ...]
    """Variables that the server must not inherit."""
    host: str
    port: int

    @property
    def address(self) -> str:
        """Where this machine reaches the server."""
        return f"http://{bracketed(loopback_of(self.host))}:{self.port}"

    @property
    def api_key(self) -> str | None:
        """The key that requests must carry."""
        return self.variables.get("VLLM_API_KEY")

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The server's whole environment."""
        kept = {
            name: value
            for name, value in inherited.items()
            if name not in self.dropped and not name.startswith("TORCHELASTIC_")
        }
        bin_folder = str(Path(self.arguments[0]).parent)  # compilers of kernels look for ninja there
        path = os.pathsep.join(filter(None, [bin_folder, kept.get("PATH", "")]))
        return kept | {"PATH": path} | dict(self.variables)

    def shown(self) -> str:
        """A line for a shell, the key left out."""
        variables = {name: value for name, value in self.variables.items() if name != "VLLM_API_KEY"}
        words = ["env", *(f"-u {name}" for name in self.dropped if name in os.environ)]
        words += [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        key = ['VLLM_API_KEY="$' + self.dropped[-1] + '"'] if self.api_key else []
        return " ".join([*words, *key, shlex.join(self.arguments)])


def server_command(
    config: VLLMRolloutConfig,
    model: ModelConfig,
    architecture: Architecture,
    *,
    longest_sequence: int,
    device: Device,
    index: int = 0,
    port: int,
    seed: int = 0,
    api_key: str | None = None,
    gpus: tuple[str, ...] = (),
    routes: bool = False,
    adapter: AdapterForm | None = None,
) -> ServerCommand:
    """Server `index` of the run; `longest_sequence` is of prompt and response together, `gpus` those of all servers.

    With `routes` it tells the experts that each token went through; with `adapter` it takes those of that form.
    Reads the disk only to see whether the model folder has weights; where it has none, the first sync brings them.
    """
    from megatron_klear.rollout.weights.base import BACKENDS, WORKER_EXTENSION  # which imports torch

    server = config.server
    dtype = model.dtype if server.dtype == "model" else server.dtype
    has_weights = model.weights == "pretrained" and any(model.path.glob("*.safetensors"))
    eager = device == "cpu" if server.eager is None else server.eager
    # One more than the longest: a probe of a whole sequence must draw a token, too.
    length = max(longest_sequence, min(longest_sequence + 1, architecture.max_positions))
    arguments = [
        *(str(server.python.absolute()), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model.path.absolute()), "--served-model-name", SERVED_NAME),
        *("--host", server.host, "--port", str(port), "--seed", str(seed)),
        *("--dtype", _DTYPES[dtype], "--load-format", "auto" if has_weights else "dummy"),
        *("--max-model-len", str(length), "--max-num-seqs", str(server.max_sequences)),
        *("--tensor-parallel-size", str(server.tensor_parallel)),
        *_memory(server, device),
        # Requests say everything themselves; defaults of the model's generation_config.json would bend the policy.
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--enable-scale-out"),
        *("--worker-extension-cls", WORKER_EXTENSION),
        *("--weight-transfer-config", json.dumps({"backend": BACKENDS[config.transfer]})),
        "--disable-uvicorn-access-log",
        *(["--enforce-eager"] if eager else []),
        *(_whole_prompts(length) if device == "cpu" else []),
        *(_routes(device) if routes else []),
        *(_adapters(adapter) if adapter is not None else []),
        *(["--enable-sleep-mode"] if config.transfer == "cuda_ipc" else []),
        *(["--middleware", GUARD] if api_key else []),
        *server.arguments,
    ]
    return ServerCommand(
        arguments=tuple(arguments),
        variables=_variables(config, device, index=index, api_key=api_key, gpus=gpus)
        | ({"KLEAR_KEEP_ROUTES": "1"} if routes and device == "cpu" else {})
        | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if adapter is not None else {}),
        dropped=(*_TRAINERS_OWN, config.api_key_variable),
        host=server.host,
        port=port,
    )


def _whole_prompts(length: int) -> list[str]:
    """Read prompts whole: one read in pieces, of a request with a seed, ends vLLM's worker on the CPU (0.32: "CPU
    Generator does not use offset").
    """
    return ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(length, 8192))]


def _routes(device: Device) -> list[str]:
    """On the CPU the worker keeps them, see `weights/route_keeper.py`."""
    return ["--no-enable-prefix-caching" if device == "cpu" else "--enable-return-routed-experts"]


def _adapters(form: AdapterForm) -> list[str]:
    """On the run's matrices alone: vLLM would put one on the head too, whose code fails where log-probs of a prompt are
    computed beside other requests (0.32, on the CPU).
    """
    rank = min(rank for rank in LORA_RANKS if rank >= form.rank)
    shape = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    return [*shape, "--lora-target-modules", *form.targets]


def _memory(server: ServerConfig, device: Device) -> list[str]:
    if server.kv_cache_gib is None and device == "cuda":
        return ["--gpu-memory-utilization", str(server.memory_share)]
    # Always given on the CPU, where vLLM would take most of the machine's memory.
    size = CPU_KV_CACHE_GIB if server.kv_cache_gib is None else server.kv_cache_gib
    return ["--kv-cache-memory-bytes", str(int(size * 2**30))]


def _variables(
    config: VLLMRolloutConfig, device: Device, *, index: int, api_key: str | None, gpus: tuple[str, ...]
) -> dict[str, str]:
    server = config.server
    variables = {
        "PYTHONPATH": str(ROOT),
        "VLLM_SERVER_DEV_MODE": "1",  # without it vLLM has no routes to replace weights, pause and sleep
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        # Idle connections are the client's to close: one that a busy server closes first fails the next request.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        variables |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // server.count)),
        }
    else:
        first = index * server.tensor_parallel
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + server.tensor_parallel])
    if config.transfer == "cuda_ipc":
        variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of CUDA memory travel pickled
    if api_key:
        variables["VLLM_API_KEY"] = api_key
    return variables


def run_commands(
    rollout: VLLMRolloutConfig, served: Served, ports: list[int], *, api_key: str | None
) -> list[ServerCommand]:
    """The servers that a run starts on this machine, one on each port, which want `api_key` where it is given."""
    return [
        server_command(
            rollout,
            served.model,
            served.architecture,
            longest_sequence=served.longest_sequence,
            device=served.device,
            index=index,
            port=port,
            seed=served.seed,
            api_key=api_key,
            gpus=server_gpus(rollout.server, os.environ) if served.device == "cuda" else (),
            routes=served.routes,
            adapter=served.adapter,
        )
        for index, port in enumerate(ports)
    ]


def loopback_of(host: str) -> str:
    """The address to reach a server at from its own machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def bracketed(host: str) -> str:
    """`host` as it stands in an address."""
    return f"[{host}]" if ":" in host else host
