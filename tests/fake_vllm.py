"""A stand-in for a vLLM server: the routes that the trainer uses, a model made of a hash, and faults on demand.

In a test:      with FakeServer() as server: ... server.url ... server.faults = iter(["oom", "cut"])
By hand:        python tests/fake_vllm.py 8000
"""

import asyncio
import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import numpy as np
from aiohttp import web

from megatron_klear.config.rl import SamplingConfig
from megatron_klear.rollout.vllm.client import Portal
from megatron_klear.rollout.vllm.routes import RouteForm, written

VOCAB = 64
ROUTES = RouteForm(layers=3, experts=8, chosen=2)
STOP = 7

ANSWER_FAULTS = (
    *("not_json", "not_an_object", "few_logprobs", "other_tokens_logprobs", "nan", "positive", "null", "unknown_token"),
    *("token_is_text", "bad_finish", "false_stop", "too_short", "gap", "short_spans", "no_spans", "started_anew"),
    *("newer", "older", "two_choices"),
)
ROUTE_FAULTS = ("no_routes", "routes_are_text", "routes_cut", "a_row_too_few", "zero_rows", "unknown_expert")
REFUSALS = ("oom", "refuse", "bad_gateway")
CUTS = ("drop", "cut", "hang")
# "stuck" draws half of its tokens and then nothing, until it is told to abort


def token_after(context: Sequence[int]) -> tuple[int, float]:
    """The token that follows, and its log-prob."""
    digest = hashlib.sha256(np.array(context, dtype=np.int32).tobytes()).digest()
    return digest[0] % VOCAB, -digest[1] / 64


def routes_of(context: Sequence[int]) -> np.ndarray:
    """The experts [tokens, layers, chosen] that tokens go through, each by what precedes it."""
    rows = []
    for place in range(1, len(context) + 1):
        digest = hashlib.sha256(b"routes" + np.array(context[:place], dtype=np.int32).tobytes()).digest()
        rows.append([np.random.default_rng(digest[layer]).permutation(8)[:2] for layer in range(ROUTES.layers)])
    return np.array(rows, dtype=np.uint8).reshape(-1, ROUTES.layers, ROUTES.chosen)


def response_to(prompt: Sequence[int], max_tokens: int) -> tuple[list[int], list[float], str]:
    """The whole response: tokens, log-probs, finish."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < max_tokens:
        token, logprob = token_after([*prompt, *tokens])
        tokens.append(token)
        logprobs.append(logprob)
        if token == STOP:
            return tokens, logprobs, "stop"
    return tokens, logprobs, "length"


class FakeServer:
    """One server in a thread of its own; a context."""

    def __init__(self, port: int = 0, *, token_seconds: float = 0.0, faults: Iterator[str] | None = None) -> None:
        """`faults` names what goes wrong with each request to generate in turn; "" is nothing."""
        self.port, self.token_seconds = port, token_seconds
        self.faults = faults or iter(())
        self.healthy = True
        self.control_faults: dict[str, str] = {}
        """What goes wrong on other routes: "oom" or "hang" by path, with its options or without."""
        self.version = "default"
        self.requests: list[dict[str, Any]] = []
        self.control: list[str] = []
        self.running = self.most_running = 0
        self.cache_tokens: int | None = None
        self.has_metrics = True
        self.drawn = 0
        """Tokens, as the metrics tell them."""
        self.aborted: list[str] = []
        self._aborts: dict[str, asyncio.Event] = {}
        self.drawn_asleep = 0
        """Requests that came while weights or cache slept."""
        self.api_key: str | None = None
        self.routes = ""
        """Where routes are told: in the "answer", by the "worker", or nowhere."""
        self._kept_routes: dict[str, list[int]] = {}
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def paused(self) -> bool:
        """Whether it draws nothing now."""
        return not self._going.is_set()

    def draw_on(self, going: bool) -> None:
        """Have it draw, or draw nothing until it is told to; its other routes answer."""
        self._portal.run(self._set(going), 10)

    async def _set(self, going: bool) -> None:
        (self._going.set if going else self._going.clear)()

    def start(self) -> None:
        """Listen; a server started again has lost its weights and keeps its port."""
        self.version = "default"
        self.asleep: set[str] = set()
        """What sleeps: weights, kv_cache."""
        self._connections: set[Any] = set()
        self._portal = Portal()
        self._portal.run(self._listen(), 10)

    def kill(self) -> None:
        """End at once: connections are reset, nothing is answered."""
        if self._portal is None:
            return
        portal, self._portal = self._portal, None
        portal.run(self._end(), 10)
        portal.close()
        self.running = 0

    def __enter__(self) -> "FakeServer":
        """The server."""
        return self

    def __exit__(self, *error: object) -> None:
        """End it."""
        self.kill()

    async def _listen(self) -> None:
        self._going = asyncio.Event()
        self._going.set()
        app = web.Application(middlewares=[self._around], client_max_size=1 << 28)
        app.router.add_get("/health", self._health)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/inference/v1/abort_requests", self._abort)
        app.router.add_post("/inference/v1/generate", self._generate)
        for path in ("/pause", "/resume", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"):
            app.router.add_post(path, self._control)
        for path in ("/finish_weight_update", "/collective_rpc", "/sleep", "/wake_up"):
            app.router.add_post(path, self._control)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def _end(self) -> None:
        for transport in self._connections:
            transport.abort()
        await self._runner.cleanup()

    @web.middleware
    async def _around(
        self, request: web.Request, handler: Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]
    ) -> web.StreamResponse:
        self._connections.add(request.transport)
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        fault = self.control_faults.get(request.path) or self.control_faults.get(_with_options(request))
        if fault == "hang":
            await asyncio.sleep(3600)
        elif fault is not None:
            return web.json_response({"error": {"message": "EngineDeadError"}}, status=500)
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        if not self.healthy:
            await asyncio.sleep(3600)
        return web.Response()

    async def _weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _metrics(self, request: web.Request) -> web.Response:
        if not self.has_metrics:
            return web.Response(status=404)
        lines = [f'vllm:generation_tokens_total{{engine="0",model_name="policy"}} {float(self.drawn)}']
        if self.cache_tokens is not None:
            lines.append(f'vllm:cache_config_info{{block_size="16",kv_cache_size_tokens="{self.cache_tokens}"}} 1.0')
        return web.Response(text="\n".join(lines) + "\n")

    async def _abort(self, request: web.Request) -> web.Response:
        for name in (await request.json())["request_ids"]:
            self.aborted.append(name)
            if name in self._aborts:
                self._aborts[name].set()
        return web.Response()

    async def _control(self, request: web.Request) -> web.Response:
        text = await request.text()
        body = json.loads(text) if text else {}
        self.control.append(_with_options(request))
        if request.path == "/sleep":
            self.asleep = {"weights", "kv_cache"}
        elif request.path == "/wake_up":
            self.asleep -= set(request.query.getall("tags", ["weights", "kv_cache"]))
        if request.path == "/pause":
            self._going.clear()
        elif request.path == "/resume":
            self._going.set()
        elif request.path == "/finish_weight_update":
            self.version = body["weight_version"]
        if body.get("method") == "klear_routes":
            name, start, end = body["args"]
            routes = routes_of(self._kept_routes.pop(name))[int(start) : int(end)]
            return web.json_response({"results": [written(routes)]})
        return web.json_response({"results": [None]} if request.path == "/collective_rpc" else {"status": "done"})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        parameters = body["sampling_params"]
        if "prompt_logprobs" in parameters:
            return web.json_response({"prompt_logprobs": _of_prompt(body["token_ids"]), "choices": []})
        self.drawn_asleep += bool(self.asleep)
        fault = next(self.faults, "")
        self.requests.append(body | {"fault": fault})
        name = f"generate-tokens-{body.get('request_id', 'x')}"
        self._aborts[name] = stop = asyncio.Event()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._answer(request, body, fault, stop)
        finally:
            del self._aborts[name]
            self.running -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], fault: str, stop: asyncio.Event
    ) -> web.StreamResponse:
        prompt, length = body["token_ids"], body["sampling_params"]["max_tokens"]
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "oom":
            message = {"message": "torch.OutOfMemoryError: CUDA out of memory", "type": "InternalServerError"}
            return web.json_response({"error": message}, status=500)
        if fault in ("refuse", "bad_gateway"):
            return web.Response(text="paused", status=503 if fault == "refuse" else 502)
        if fault == "bad_request":
            return web.json_response({"error": {"message": "max_tokens is too large"}}, status=400)
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        answer = await self._draw(prompt, length, fault, stop)
        drawn = answer["choices"][0]["token_ids"]
        if self.routes == "worker":
            self._kept_routes[f"generate-tokens-{body['request_id']}"] = [*prompt, *drawn]
        elif self.routes == "answer" and drawn:
            start = body["sampling_params"].get("routed_experts_prompt_start", 0)
            answer["choices"][0]["routed_experts"] = written(routes_of([*prompt, *drawn][:-1])[start:])
        text = json.dumps(answer if fault in ("", "abort", "stuck", "cut", "slow") else spoilt(answer, fault))
        if fault == "not_json":
            text = "<html>busy</html>"
        if fault == "slow":
            await asyncio.sleep(0.3)
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Length": str(len(text))})
            await response.prepare(request)
            await response.write(text[: len(text) // 2].encode())
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(text=text, content_type="application/json")

    async def _draw(self, prompt: list[int], length: int, fault: str, stop: asyncio.Event) -> dict[str, Any]:
        tokens, logprobs, finish = response_to(prompt, length)
        if fault in ("abort", "stuck"):
            tokens, logprobs, finish = tokens[: len(tokens) // 2], logprobs[: len(tokens) // 2], "abort"
        spans: list[dict[str, Any]] = []
        for place in range(len(tokens)):
            if self.token_seconds:
                await asyncio.sleep(self.token_seconds)
            await self._going.wait()
            if stop.is_set():
                tokens, logprobs, finish = tokens[:place], logprobs[:place], "abort"
                break
            self.drawn += 1
            if not spans or spans[-1]["version"] != self.version:
                spans.append({"version": self.version, "start": place, "end": place})
            spans[-1]["end"] = place + 1
        if fault == "stuck":
            await stop.wait()
        content = [
            {"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        choice = {"index": 0, "finish_reason": finish, "token_ids": tokens, "logprobs": {"content": content}}
        return {"request_id": "x", "choices": [choice | {"weight_versions": spans}]}


def spoilt(answer: dict[str, Any], fault: str) -> Any:
    """The answer with one thing wrong."""
    choice = answer["choices"][0]
    content, spans = choice["logprobs"]["content"], choice["weight_versions"]
    last = spans[-1]
    values = {"nan": float("nan"), "positive": 0.5, "null": None}
    if fault == "not_an_object":
        return [answer]
    if fault == "two_choices":
        answer["choices"].append(choice)
    elif fault == "few_logprobs":
        content.pop()
    elif fault == "other_tokens_logprobs":
        content[0]["token_id"] += 1
    elif fault in values:
        content[-1]["logprob"] = values[fault]
    elif fault in ("unknown_token", "token_is_text"):
        choice["token_ids"][0] = content[0]["token_id"] = VOCAB if fault == "unknown_token" else "7"
    elif fault == "bad_finish":
        choice["finish_reason"] = "error"
    elif fault == "false_stop":
        choice["finish_reason"] = "length" if choice["finish_reason"] == "stop" else "stop"
    elif fault == "too_short":
        choice["finish_reason"] = "length"
        choice["token_ids"].pop()
        content.pop()
        last["end"] -= 1
    elif fault == "gap":
        spans[0]["start"] += 1
    elif fault == "short_spans":
        last["end"] -= 1
    elif fault == "no_spans":
        choice["weight_versions"] = None
    elif fault in ROUTE_FAULTS:
        routes = routes_of([1] * (len(choice["token_ids"]) + 2))
        arrays = {"zero_rows": routes * 0, "a_row_too_few": routes[:-1], "unknown_expert": routes + 8}
        told: Any = {"no_routes": None, "routes_are_text": "0 1", "routes_cut": written(routes)[:100]}
        choice["routed_experts"] = told[fault] if fault in told else written(arrays[fault])
    elif fault in ("started_anew", "newer", "older"):
        last["version"] = {"started_anew": "default", "newer": "1000", "older": "0"}[fault]
    return answer


def _with_options(request: web.Request) -> str:
    return request.path + "".join(f" {value}" for value in request.query.values())


def _of_prompt(tokens: list[int]) -> list[dict[str, dict[str, float]] | None]:
    scored: list[dict[str, dict[str, float]] | None] = [None]
    for place in range(1, len(tokens)):
        scored.append({str(tokens[place]): {"logprob": token_after(tokens[:place])[1], "rank": 1}})
    return scored


def sampling(count: int = 2, max_tokens: int = 12) -> SamplingConfig:
    """What tests draw with."""
    return SamplingConfig(samples_per_prompt=count, max_tokens=max_tokens)


if __name__ == "__main__":
    with FakeServer(int(sys.argv[1]), token_seconds=0.001), contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
