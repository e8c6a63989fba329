"""The servers' side of weight transfer; the only module that imports vllm, and it runs in the servers' environment.

A server finds it by --worker-extension-cls megatron_klear.rollout.weights.receiver.WeightReceiver, which adds methods
to every worker and, because the module is imported before the model is loaded, registers three weight-transfer
backends. Each notes a checksum of every tensor as it received it, in the model's precision.

Written for vLLM 0.32. The backends on files have run on the CPU; those on CUDA IPC and NCCL, which only wrap vLLM's
own, have not been run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from megatron_klear.models.peft import WEIGHTS_FILE
from megatron_klear.rollout.vllm.routes import written
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.rollout.weights.route_keeper import keep_routes

if os.environ.get("KLEAR_KEEP_ROUTES") == "1":
    keep_routes()  # before the worker makes its model runner


class _Watched:
    """Stands before the model while weights are loaded: notes what comes, in the model's precision."""

    def __init__(self, model: Any, checksums: dict[str, str], dtype: torch.dtype) -> None:
        self._model, self._checksums, self._dtype = model, checksums, dtype

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return self._model.load_weights(self._noted(weights))

    def _noted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            # A copy: the model keeps tensors of a layer until the last of it has come, maybe in another bucket, and
            # the sender's memory or file is only lent until this bucket is answered.
            received = tensor.to(self._dtype, copy=True)
            self._checksums[name] = checksum(received)
            yield name, received


class _NotesChecksums(WeightTransferEngine):
    """What the three backends add to a weight-transfer engine."""

    model: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.checksums: dict[str, str] = {}

    replaced = False
    """Whether the weights that the server was started with were touched."""

    def start_weight_update(self) -> None:
        """Begin; what is left of an update that was never finished is forgotten."""
        self.checksums, self.replaced = {}, True
        for layer in self.model.modules():
            reloading = get_layerwise_info(layer)
            if reloading.can_load():
                reloading.loaded_weights.clear()
                reloading.load_numel = 0
        super().start_weight_update()

    def receive_weights(self, update_info: Any) -> None:
        """Load a bucket and note its checksums."""
        model = self.model
        self.model = _Watched(model, self.checksums, self.model_config.dtype)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        """Put the weights to use."""
        super().finish_weight_update()
        refresh_tied_head(self.model, self.model_config)
        repack_experts(self.model)


def refresh_tied_head(model: Any, model_config: Any) -> None:
    """Pack a tied head anew on the CPU.

    vLLM keeps linear weights packed there and repacks those that were loaded; a tied head has none of its own to
    load, so that logits would go on coming from the old embedding.
    """
    head = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and model_config.hf_text_config.tie_word_embeddings and head is not None:
        head.quant_method.process_weights_after_loading(head)


def repack_experts(model: Any) -> None:
    """Pack experts anew on the CPU.

    vLLM packs them for its kernel when a model is first loaded, and leaves them as they come when they are replaced: it
    would go on computing with matrices that are read in the wrong order.
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


@dataclass
class _NoInitInfo(WeightTransferInitInfo):
    pass


@dataclass
class _FileUpdateInfo(WeightTransferUpdateInfo):
    path: str
    wait_seconds: float = 0.0


class _Files(WeightTransferEngine):
    """Weights from safetensors files under their Hugging Face names."""

    init_info_cls = _NoInitInfo
    update_info_cls = _FileUpdateInfo

    def init_transfer_engine(self, init_info: _NoInitInfo) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if torch.accelerator.is_available():
            super().update_weights(update_info)
        else:  # there is nothing to synchronise with, and vLLM's raises
            self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: _FileUpdateInfo) -> None:
        path = Path(update_info.path)
        _await_file(path, update_info.wait_seconds)
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


def _await_file(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: servers must see the transfer files of the trainer")


class FileReceiver(_NotesChecksums, _Files):
    """Backend `klear_file`."""


class IPCReceiver(_NotesChecksums, IPCWeightTransferEngine):
    """Backend `klear_ipc`: vLLM's CUDA IPC."""


class NCCLReceiver(_NotesChecksums, NCCLWeightTransferEngine):
    """Backend `klear_nccl`: vLLM's NCCL broadcast."""


for _name, _engine in (("klear_file", FileReceiver), ("klear_ipc", IPCReceiver), ("klear_nccl", NCCLReceiver)):
    WeightTransferEngineFactory.register_engine(_name, _engine)


class WeightReceiver:
    """Methods that every worker of a server gains, called through /collective_rpc with strings."""

    def klear_describe(self) -> dict[str, str]:
        """What the worker was started with."""
        worker: Any = self
        config = worker.vllm_config
        return {
            "backend": config.weight_transfer_config.backend if config.weight_transfer_config else "none",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "device": str(worker.device),
            "lora_rank": str(config.lora_config.max_lora_rank if config.lora_config else 0),
            # Empty is every matrix that vLLM knows.
            "lora_targets": " ".join((config.lora_config and config.lora_config.target_modules) or ()),
            "base": "replaced" if getattr(worker.weight_transfer_engine, "replaced", False) else "as started",
        }

    def klear_begin_update(self, version: str) -> None:
        """Announce an update; one that was never finished, as when its trainer died, is given up."""
        worker: Any = self
        if worker._weight_update_active:
            worker._weight_update_active = False
            worker.weight_transfer_engine.reset_weight_update_target()
        worker.klear_version = version
        worker.weight_transfer_engine.checksums = {}

    def klear_load_adapter(self, name: str, path: str, wait_seconds: str) -> None:
        """Put the adapter in a folder in the place of the one before, also for requests under way; note checksums."""
        worker: Any = self
        weights = Path(path) / WEIGHTS_FILE
        _await_file(weights, float(wait_seconds))
        # Numbers are given by the server when it hears a name; there is one name.
        number = next(iter(worker.list_loras()), 1)
        if not worker.add_lora(LoRARequest(name, number, path, load_inplace=True)):
            raise RuntimeError(f"vLLM did not load the adapter in {path}")
        with safe_open(weights, framework="pt") as file:
            read = {key: checksum(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        worker.weight_transfer_engine.checksums = read

    def klear_routes(self, request: str, start: str, end: str) -> str:
        """Experts of tokens `start` to `end` of a request, which are forgotten; see `rollout.vllm.routes`."""
        worker: Any = self
        return written(worker.model_runner.klear_routes.take(request, int(start), int(end)))

    def klear_checksums(self, version: str) -> dict[str, str]:
        """Checksums by name of what the update to `version` brought."""
        worker: Any = self
        announced = getattr(worker, "klear_version", None)
        if announced != version:
            raise ValueError(f"the last update announced to this worker is to version {announced}, not {version}")
        checksums: dict[str, str] = worker.weight_transfer_engine.checksums
        return checksums
