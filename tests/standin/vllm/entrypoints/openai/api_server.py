"""The routes of vLLM's server that the project uses, over the project's decoder."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from safetensors.torch import load_file

from megatron_klear.models.architecture import read_architecture
from megatron_klear.rollout.local.decoder import Decoder
from megatron_klear.rollout.weights.checksum import checksum

from .scheduler import Request, Scheduler

torch.set_num_threads(1)


class Server:
    """State of the server."""

    def __init__(self, options: argparse.Namespace) -> None:
        model = Path(options.model)
        architecture = read_architecture(model)
        if architecture.rope.kind != "default":
            raise SystemExit("the stand-in knows plain rotary embeddings only")
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
        frequencies = 1.0 / architecture.rope.theta**exponents
        dtype = getattr(torch, options.dtype)
        self.decoder = Decoder(architecture, frequencies, 1.0, dtype, torch.device("cpu"))
        self.loaded = options.load_format != "dummy"
        if self.loaded:
            self.decoder.load(load_file(model / "model.safetensors").items())
        self.limit = options.max_model_len
        self.scheduler = Scheduler(self.decoder, options.max_num_seqs, self.limit)
        self.received: dict[str, torch.Tensor] = {}
        self.checksums: dict[str, str] = {}
        self.announced = ""

    def routes(self) -> list[web.RouteDef]:
        """Everything that is answered."""
        posts: dict[str, Callable[[Any, web.Request], Awaitable[Any]]] = {
            "/inference/v1/generate": self.generate,
            "/pause": self.pause,
            "/resume": self.resume,
            "/reset_prefix_cache": self.reset_prefix_cache,
            "/init_weight_transfer_engine": self.nothing,
            "/start_weight_update": self.start_update,
            "/update_weights": self.update,
            "/finish_weight_update": self.finish_update,
            "/collective_rpc": self.rpc,
            "/sleep": self.nothing,
            "/wake_up": self.nothing,
        }
        gets = [web.get("/health", self.health), web.get("/weight_info", self.weight_info)]
        return [*gets, web.get("/get_world_size", self.world_size)] + [
            web.post(path, self._answering(handler)) for path, handler in posts.items()
        ]

    def _answering(self, handler: Callable[[Any, web.Request], Awaitable[Any]]) -> Any:
        async def answer(request: web.Request) -> web.Response:
            body = await request.json() if request.can_read_body else None
            return web.json_response(await handler(body, request))

        return answer

    async def health(self, request: web.Request) -> web.Response:
        """Ready."""
        return web.Response()

    async def weight_info(self, request: web.Request) -> web.Response:
        """The label of the weights."""
        return web.json_response({"weight_version": self.scheduler.version})

    async def world_size(self, request: web.Request) -> web.Response:
        """One worker."""
        return web.json_response({"world_size": 1})

    async def nothing(self, body: Any, request: web.Request) -> Any:
        """Answer that it is done."""
        return {}

    async def reset_prefix_cache(self, body: Any, request: web.Request) -> Any:
        """There is none beyond the requests' own, which are read anew after a pause."""
        return {"success": True}

    async def generate(self, body: Any, request: web.Request) -> Any:
        """Draw a response, or give the log-probs of a prompt."""
        parameters, tokens = body["sampling_params"], body["token_ids"]
        if len(tokens) + parameters["max_tokens"] > self.limit:
            raise web.HTTPBadRequest(text=f"more than {self.limit} tokens")
        answer: dict[str, Any] = {}
        if "prompt_logprobs" in parameters:
            values = await asyncio.to_thread(self.scheduler.prompt_logprobs, tokens)
            pairs = zip(tokens[1:], values, strict=True)
            answer["prompt_logprobs"] = [None, *({str(token): {"logprob": value}} for token, value in pairs)]
            return answer | {"choices": []}
        uniforms = np.random.Generator(np.random.Philox(key=parameters.get("seed") or 0))
        drawn = Request(prompt=tokens, parameters=parameters, uniforms=uniforms)
        self.scheduler.submit(drawn)
        finish = await asyncio.wrap_future(drawn.done)
        content = [
            {"token_id": token, "logprob": value} for token, value in zip(drawn.tokens, drawn.logprobs, strict=True)
        ]
        choice = {"token_ids": drawn.tokens, "logprobs": {"content": content}, "weight_versions": drawn.spans}
        return {"choices": [choice | {"finish_reason": finish}]}

    async def pause(self, body: Any, request: web.Request) -> Any:
        """Stop drawing."""
        await asyncio.to_thread(self.scheduler.pause, request.query.get("mode", "abort"))
        return {}

    async def resume(self, body: Any, request: web.Request) -> Any:
        """Go on drawing."""
        self.scheduler.resume()
        return {}

    async def start_update(self, body: Any, request: web.Request) -> Any:
        """Forget what an earlier update brought."""
        self.received = {}
        return {}

    async def update(self, body: Any, request: web.Request) -> Any:
        """Take a bucket."""
        for name, tensor in load_file(body["update_info"]["path"]).items():
            self.received[name] = tensor.to(self.decoder.dtype)
            self.checksums[name] = checksum(self.received[name])
        return {}

    async def finish_update(self, body: Any, request: web.Request) -> Any:
        """Put the weights to use."""
        with self.scheduler.lock:
            self.decoder.load(self.received.items())
            self.scheduler.version = str(body["weight_version"])
        self.received = {}
        return {}

    async def rpc(self, body: Any, request: web.Request) -> Any:
        """The methods of the worker extension."""
        method, args = body["method"], body["args"]
        if method == "klear_begin_update":
            self.announced, self.checksums = args[0], {}
            return {"results": [None]}
        if method == "klear_checksums" and args[0] == self.announced:
            return {"results": [self.checksums]}
        if method == "klear_describe":
            dtype = str(self.decoder.dtype).removeprefix("torch.")
            return {"results": [{"backend": "klear_file", "dtype": dtype, "device": "cpu"}]}
        raise web.HTTPInternalServerError(text=json.dumps({"error": f"no method {method} {args}"}))


@web.middleware
async def with_key(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
    """Refuse who does not know the key, where there is one."""
    key = os.environ.get("VLLM_API_KEY")
    if key and request.path != "/health" and request.headers.get("Authorization") != f"Bearer {key}":
        raise web.HTTPUnauthorized
    return await handler(request)


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--host", "--dtype", "--load-format"):
        parser.add_argument(name, required=True)
    for name in ("--port", "--max-model-len", "--max-num-seqs"):
        parser.add_argument(name, type=int, required=True)
    options, _ = parser.parse_known_args()
    app = web.Application(client_max_size=1 << 28, middlewares=[with_key])
    app.add_routes(Server(options).routes())
    print(f"stand-in {os.getpid()} serves {options.model}", flush=True)
    web.run_app(app, host=options.host, port=options.port, print=None)


if __name__ == "__main__":
    main()
