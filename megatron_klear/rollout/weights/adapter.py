"""Adapters to vLLM servers that hold the base already: a folder as PEFT writes it, which every worker loads in place.

An adapter has one name for good, and requests under way go on with what it is replaced by. vLLM's own route for that
(`load_inplace` of /v1/load_lora_adapter) would have a server read the files again at every step (0.32), so that it only
makes the name known, and the workers are told to load through the extension of `receiver`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from megatron_klear.models.peft import WEIGHTS_FILE, AdapterForm, write_adapter_config
from megatron_klear.rollout.engine import Checksums
from megatron_klear.rollout.servers.command import SERVED_NAME
from megatron_klear.rollout.vllm.client import ADAPTER_NAME, Portal, ServerClient, ServerError
from megatron_klear.rollout.weights.base import BACKENDS, ByFiles, check_server
from megatron_klear.rollout.weights.files import BucketFolder
from megatron_klear.rollout.weights.update import WeightUpdate

_LOAD = "/v1/load_lora_adapter"
_KNOWN = "already been loaded"  # by a trainer before this one


class AdapterTransport(ByFiles):
    """The WeightTransport of `lora.sync = "adapter"`: `weights` are the adapters, under PEFT's names."""

    def __init__(
        self,
        folder: BucketFolder | None,
        form: AdapterForm,
        *,
        dtype: torch.dtype,
        timeout_seconds: float,
        wait_seconds: float = 0.0,
    ) -> None:
        """Adapters of one form; otherwise as ByFiles."""
        super().__init__(folder, dtype=dtype, timeout_seconds=timeout_seconds, wait_seconds=wait_seconds)
        self._form = form
        self._named: set[str] = set()
        self._sent = 0

    def detach(self, url: str) -> None:
        """Forget a server: one that is started again knows no adapter."""
        super().detach(url)
        self._named.discard(url)

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: int,
        servers: Sequence[ServerClient],
        portal: Portal | None,
    ) -> Checksums:
        """See WeightTransport. All adapters are held at once; their folder is gone when all servers have read it."""
        if portal is None or self._folder is None:
            for _ in weights:
                pass
            return {}
        tensors = {name: tensor.detach().to("cpu", self._dtype).contiguous() for name, tensor in weights}
        update = WeightUpdate(servers, portal, version, timeout_seconds=self._timeout_seconds)
        self._sent += 1
        folder = self._folder.path / f"adapter-{self._sent:08d}"  # a name never used before
        try:
            self._write(folder, tensors)
        except OSError as error:
            update.drop_all(f"the adapter could not be written to {folder.parent.parent}: {error}")
        try:
            update.announce()
            update.each("load_adapter", lambda server: self._load(server, folder))
            update.each("name", lambda server: self._name(server, folder))
            named = {"new_version": str(version)}
            update.each("update_weight_version", lambda server: self._post(server, "/update_weight_version", named))
            return update.prove()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _check(self, server: ServerClient) -> None:
        await check_server(server, BACKENDS["disk"], self._dtype, self._timeout_seconds, adapter=self._form)

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        staging = folder.with_suffix(".partial")
        try:
            staging.mkdir()
            write_adapter_config(staging, self._form, SERVED_NAME)
            whole = save(tensors, metadata={"format": "pt"})
            (staging / WEIGHTS_FILE).write_bytes(whole)  # tells a full disk as an OSError
            staging.rename(folder)
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(staging)

    async def _load(self, server: ServerClient, folder: Path) -> None:
        arguments = [ADAPTER_NAME, str(folder), str(self._wait_seconds)]
        await server.rpc("klear_load_adapter", arguments, timeout_seconds=self._timeout_seconds + self._wait_seconds)

    async def _name(self, server: ServerClient, folder: Path) -> None:
        """Make the adapter's name known to the server that is new; its workers have it loaded."""
        if server.url in self._named:
            return
        try:
            await self._post(server, _LOAD, {"lora_name": ADAPTER_NAME, "lora_path": str(folder)})
        except ServerError as error:
            if error.status != 200 and _KNOWN not in error.text:  # it says yes in words, which are no JSON
                raise
        self._named.add(server.url)

    async def _post(self, server: ServerClient, path: str, body: dict[str, str]) -> None:
        await server.post(path, body, timeout_seconds=self._timeout_seconds)
