"""One rollout server over HTTP: token ids in; token ids, log-probs and the weights' versions out, or an error.

An answer is read strictly: whatever does not hold together is a `GarbageAnswer`, never a sample. Imports no torch.
"""

from __future__ import annotations

import asyncio
import resource
import threading
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import aiohttp
import numpy as np
import numpy.typing as npt

from megatron_klear.rollout.servers.metrics import ServerLoad, read_metrics
from megatron_klear.rollout.vllm.answers import (
    ForeignWeights,
    Malformed,
    Read,
    read_completion,
    read_prompt_logprobs,
)
from megatron_klear.rollout.vllm.routes import RouteForm, read_routes
from megatron_klear.types import Routes, VersionSpan

if TYPE_CHECKING:
    from megatron_klear.config.rl import SamplingConfig

Result = TypeVar("Result")
PauseMode = Literal["abort", "wait", "keep"]

_GENERATE = "/inference/v1/generate"
ADAPTER_NAME = "policy-adapter"
"""What requests call the model that has the run's adapter on it."""
_REQUEST_PREFIX = "generate-tokens-"  # what vLLM puts before a request's own id
_HEALTH_SECONDS = 5.0
_CONNECT_SECONDS = 10.0
# Below the 5 s after which the server closes an idle connection: else a request may go out on one just closed.
_KEEP_ALIVE_SECONDS = 3.0
_SHOWN_CHARACTERS = 500
_OTHER_FILES = 1024


class ServerError(Exception):
    """A server did not do as it was asked."""

    def __init__(self, url: str, path: str, status: int | None, text: str) -> None:
        """`status` of HTTP, None where there was no whole answer; `text` is the answer or what went wrong."""
        super().__init__(url, path, status, text)
        self.url, self.path, self.status, self.text = url, path, status, text

    def __str__(self) -> str:
        """Server, route, status and the beginning of the text."""
        answered = "gave no answer" if self.status is None else f"answered {self.status}"
        return f"{self.url}{self.path} {answered}: {self.text[:_SHOWN_CHARACTERS]}"

    @property
    def is_refusal(self) -> bool:
        """Whether the request itself is at fault (4xx), so that asking again does not help."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in (408, 409, 425, 429)


class GarbageAnswer(ServerError):
    """An answer that does not hold together."""


class WrongWeights(GarbageAnswer):
    """An answer drawn with other weights than the server should hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One response, or the part of it that was drawn before an abort.

    `version_spans` cover the tokens without a gap; there are none where there is no token.
    """

    token_ids: npt.NDArray[np.int32]  # [n], the stop token included
    logprobs: npt.NDArray[np.float32]  # [n], of the distribution sampled from
    finish: Literal["stop", "length", "abort"]
    version_spans: tuple[VersionSpan, ...]
    routes: Routes | None = None  # [tokens read but for the last and those left out, layers, chosen]


class ServerClient:
    """The routes of one server; to be used on the event loop of its session."""

    def __init__(
        self,
        url: str,
        *,
        session: aiohttp.ClientSession,
        api_key: str | None,
        vocab_size: int | None = None,
        routes: RouteForm | None = None,
        model: str | None = None,
    ) -> None:
        """`url` is `http://host:port`; answers with token ids of `vocab_size` or above are garbage.

        With `routes` those without the experts of every token are, too. `model` is the one that requests are for, the
        server's only one where it is not given.
        """
        self.url, self._routes = url.rstrip("/"), routes
        self._named = {} if model is None else {"model": model}
        self._session, self._vocab_size = session, vocab_size
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def healthy(self, timeout_seconds: float = _HEALTH_SECONDS) -> bool:
        """Whether the server says within the timeout that it is ready."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_seconds)
            async with self._session.get(self.url + "/health", headers=self._headers, timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def weight_version(self, timeout_seconds: float = _HEALTH_SECONDS) -> str | None:
        """The label of the weights that the server holds; None where it does not say."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_seconds)
            async with self._session.get(self.url + "/weight_info", headers=self._headers, timeout=timeout) as response:
                answer = await response.json(content_type=None) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None
        label = answer.get("weight_version") if isinstance(answer, dict) else None
        return label if isinstance(label, str) else None

    async def load(self, timeout_seconds: float = _HEALTH_SECONDS) -> ServerLoad | None:
        """What the server has computed so far and can hold; None where it does not say."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_seconds)
            async with self._session.get(self.url + "/metrics", headers=self._headers, timeout=timeout) as response:
                return read_metrics(await response.text()) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None

    async def abort(self, request_id: str, timeout_seconds: float = _HEALTH_SECONDS) -> None:
        """Have the server answer a request to `generate` with what it has drawn so far."""
        body = {"request_ids": [_REQUEST_PREFIX + request_id]}
        await self.post("/inference/v1/abort_requests", body, timeout_seconds=timeout_seconds)

    async def generate(
        self,
        tokens: Sequence[int] | npt.NDArray[np.int32],
        *,
        sampling: SamplingConfig,
        seed: int | None,
        stop_token_ids: Iterable[int],
        timeout_seconds: float | None = None,
        request_id: str | None = None,
        routes_from: int = 0,
    ) -> Completion:
        """Draw one response to `tokens`, of at most `sampling.max_tokens`.

        It may take as long as it takes where no timeout is given; `request_id` is its name for `abort`. Where routes
        are asked for, those of the first `routes_from` tokens are left out.

        It ends at `stop_token_ids` and those of `sampling` alone, whatever the model's own settings say. Raises
        ServerError, and GarbageAnswer where the answer cannot be a sample.
        """
        stop = sorted({*stop_token_ids, *sampling.stop_token_ids})
        parameters = _parameters(sampling, stop, seed)
        if self._routes is not None and routes_from:
            parameters["routed_experts_prompt_start"] = routes_from
        ids = [int(token) for token in tokens]
        body: dict[str, Any] = self._named | {"token_ids": ids, "sampling_params": parameters}
        if self._routes is not None and request_id is None:
            request_id = uuid.uuid4().hex
        if request_id is not None:
            body["request_id"] = request_id
        answer = await self.post(_GENERATE, body, timeout_seconds=timeout_seconds)
        try:
            read = read_completion(
                answer, max_tokens=sampling.max_tokens, vocab_size=self._vocab_size, stop=frozenset(stop)
            )
            # The last token was drawn and never read.
            routes = await self._routes_of(read, request_id, routes_from, len(tokens) + len(read.token_ids) - 1)
        except ForeignWeights as error:
            raise WrongWeights(self.url, _GENERATE, 200, str(error)) from None
        except Malformed as error:
            raise GarbageAnswer(self.url, _GENERATE, 200, str(error)) from None
        logprobs = read.logprobs
        if sampling.temperature == 0:
            # Greedy: all of the distribution lies on the token taken; servers report the model's own log-prob.
            logprobs = np.zeros_like(logprobs)
        return Completion(
            token_ids=read.token_ids,
            logprobs=logprobs,
            finish=read.finish,
            version_spans=read.version_spans,
            routes=routes,
        )

    async def _routes_of(self, read: Read, request_id: str | None, start: int, end: int) -> Routes | None:
        """Routes of tokens `start` to `end`; None where none are asked for, or nothing was drawn. Raises Malformed."""
        form = self._routes
        if form is None or not len(read.token_ids):
            return None
        told = read.routed_experts
        if form.kept_by_worker:
            told, *_ = await self.rpc("klear_routes", [f"{_REQUEST_PREFIX}{request_id}", str(start), str(end)])
        return read_routes(told, form, end - start)

    async def prompt_logprobs(
        self, tokens: Sequence[int] | npt.NDArray[np.int32], timeout_seconds: float = 300
    ) -> npt.NDArray[np.float32]:
        """Log-probs [n - 1] at temperature 1 of tokens[1:] given what precedes each."""
        ids = [int(token) for token in tokens]
        parameters = {"n": 1, "temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        answer = await self.post(
            _GENERATE,
            self._named | {"token_ids": ids, "sampling_params": parameters},
            timeout_seconds=timeout_seconds,
        )
        try:
            return read_prompt_logprobs(answer, ids)
        except Malformed as error:
            raise GarbageAnswer(self.url, _GENERATE, 200, str(error)) from None

    async def post(
        self, path: str, json: Any = None, params: dict[str, Any] | None = None, timeout_seconds: float | None = 300
    ) -> Any:
        """The decoded JSON answer, None where it is empty.

        Raises ServerError for any status but 200, for no whole answer within the timeout, and GarbageAnswer where the
        answer is not JSON.
        """
        timeout = aiohttp.ClientTimeout(
            total=timeout_seconds, sock_connect=min(timeout_seconds or _CONNECT_SECONDS, _CONNECT_SECONDS)
        )
        try:
            async with self._session.post(
                self.url + path, json=json, params=params, headers=self._headers, timeout=timeout
            ) as response:
                body = await response.read()
                if response.status != 200:
                    raise ServerError(self.url, path, response.status, body.decode(errors="replace"))
                return await response.json(content_type=None) if body else None
        except TimeoutError:
            raise ServerError(
                self.url, path, None, f"nothing within {timeout_seconds or _CONNECT_SECONDS:g} s"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(self.url, path, None, f"{type(error).__name__}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise GarbageAnswer(self.url, path, 200, f"not JSON: {error}") from None

    async def rpc(
        self, method: str, args: Sequence[str] = (), kwargs: dict[str, str] | None = None, timeout_seconds: float = 300
    ) -> list[Any]:
        """Call a method of every worker; one result a worker. Arguments are strings."""
        path = "/collective_rpc"
        body = {"method": method, "args": list(args), "kwargs": kwargs or {}}
        answer = await self.post(path, body, timeout_seconds=timeout_seconds)
        if answer is None:
            return []
        if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):
            raise GarbageAnswer(self.url, path, 200, f"no results in {answer!r}")
        return list(answer["results"])

    async def pause(self, mode: PauseMode = "keep", timeout_seconds: float = 300) -> None:
        """Stop drawing tokens and empty the prefix cache: abort what is under way, wait for it, or keep it."""
        await self.post("/pause", params={"mode": mode}, timeout_seconds=timeout_seconds)

    async def resume(self, timeout_seconds: float = 300) -> None:
        """Go on after a pause."""
        await self.post("/resume", timeout_seconds=timeout_seconds)

    async def sleep(self, level: int, timeout_seconds: float = 300) -> None:
        """Give back GPU memory: level 1 keeps the weights in host memory, level 2 drops them."""
        await self.post("/sleep", params={"level": str(level)}, timeout_seconds=timeout_seconds)

    async def wake_up(self, tags: Sequence[str] = (), timeout_seconds: float = 300) -> None:
        """Take GPU memory again, all of it or that of `tags` (`weights`, `kv_cache`)."""
        await self.post("/wake_up", params={"tags": list(tags)} if tags else None, timeout_seconds=timeout_seconds)


def _parameters(sampling: SamplingConfig, stop: Sequence[int], seed: int | None) -> dict[str, Any]:
    """What a request says of how one response is drawn."""
    parameters: dict[str, Any] = {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "logprobs": 0,
        "stop_token_ids": list(stop),
        "ignore_eos": True,  # the stop tokens above are all there are
        "detokenize": False,
    }
    return parameters if seed is None else parameters | {"seed": seed}


def open_session(connections: int = 256) -> aiohttp.ClientSession:
    """One connection pool for all servers, of up to `connections`; to be called on the loop that uses it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
    return aiohttp.ClientSession(connector=connector)


class Portal:
    """A thread with an event loop, through which other threads run coroutines."""

    def __init__(self) -> None:
        """Start the thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-portal", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result], timeout: float | None = None) -> Result:
        """The coroutine's result; raises TimeoutError, and cancels it, when it takes longer than `timeout` seconds."""
        future = self.start(coroutine)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run the coroutine in the background."""
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("the portal is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what runs and end the thread. May be called twice."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
