"""The weight-transfer routes of a vLLM server, in memory: what comes in which order, and faults on demand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from safetensors.torch import load_file

from megatron_klear.rollout.vllm.client import Portal, ServerClient, open_session
from megatron_klear.rollout.weights.checksum import checksum


class FakeReceiver:
    """One server; `fault` is called with every route (or rpc method) and may raise web exceptions, sleep or damage."""

    def __init__(self, *, backend: str = "klear_file", dtype: str = "float32", workers: int = 1) -> None:
        self.description = {"backend": backend, "dtype": dtype, "device": "cpu"}
        self.workers = workers
        self.clears_cache = True
        self.adapter: str | None = None
        self.form: dict[str, Any] = {}
        self.calls: list[tuple[str, Any]] = []
        self.loaded: dict[str, torch.Tensor] = {}
        self.checksums: dict[str, str] = {}
        self.fault: Callable[[str, Any], Any] | None = None
        self.on_update: Callable[[dict[str, Any]], dict[str, torch.Tensor]] = lambda info: load_file(info["path"])

    @property
    def routes(self) -> list[str]:
        """Names of the calls so far."""
        return [name for name, _ in self.calls]

    async def start(self) -> str:
        """Listen; returns the address."""
        app = web.Application()
        app.router.add_post("/{route}", self._answer)
        app.router.add_post("/v1/{route}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """End."""
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        route = request.match_info["route"]
        name = body["method"] if route == "collective_rpc" else route
        self.calls.append((name, body))
        if self.fault:
            outcome = self.fault(name, self)
            if outcome is not None:
                await outcome
        if name == "klear_describe":
            return web.json_response({"results": [self.description] * self.workers})
        if name == "klear_begin_update":
            self.checksums = {}
        elif name == "load_lora_adapter" and self.adapter is not None:
            return web.json_response({"error": {"message": "The lora adapter has already been loaded."}}, status=400)
        elif name == "load_lora_adapter":
            self.adapter = body["lora_name"]
            return web.Response(text=f"Success: LoRA adapter '{self.adapter}' added successfully.")
        elif name == "klear_load_adapter":
            self.form = json.loads((Path(body["args"][1]) / "adapter_config.json").read_text())
            self.loaded = load_file(Path(body["args"][1]) / "adapter_model.safetensors")
            self.checksums = {key: checksum(tensor) for key, tensor in self.loaded.items()}
        elif name == "update_weights":
            tensors = self.on_update(body["update_info"])
            self.loaded |= tensors
            self.checksums |= {key: checksum(tensor) for key, tensor in tensors.items()}
        elif name == "klear_checksums":
            return web.json_response({"results": [self.checksums] * self.workers})
        elif name == "reset_prefix_cache":
            return web.json_response({"success": self.clears_cache})
        return web.json_response({"results": [None] * self.workers})


class Receivers:
    """Fake servers, and clients of them."""

    def __init__(self) -> None:
        self.portal = Portal()
        self._session = self.portal.run(_session())
        self._all: list[FakeReceiver] = []

    def add(self, receiver: FakeReceiver) -> ServerClient:
        """Start a server; returns its client."""
        self._all.append(receiver)
        return ServerClient(self.portal.run(receiver.start()), session=self._session, api_key=None)

    def close(self) -> None:
        """End all."""
        for receiver in self._all:
            self.portal.run(receiver.stop())
        self.portal.run(self._session.close())
        self.portal.close()


async def _session() -> Any:
    return open_session()
