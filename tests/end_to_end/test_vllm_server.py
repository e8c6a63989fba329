"""Servers started for a run, with the real vLLM."""

import asyncio
import json
import urllib.request
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from vllm_server import LONGEST_SEQUENCE, RunningServer

from megatron_klear.rollout.servers.metrics import ServerLoad
from megatron_klear.rollout.vllm.client import ServerClient, open_session


def post(server: RunningServer, path: str, body: object) -> dict:
    request = urllib.request.Request(
        server.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.vllm
def test_a_server_is_ready_for_weights_and_for_the_longest_sequence(vllm_server: RunningServer):
    (worker,) = post(vllm_server, "/collective_rpc", {"method": "klear_describe"})["results"]
    assert worker == {"backend": "klear_file", "dtype": "float32", "device": "cpu"}
    asked = {
        "model": "policy",
        "token_ids": [7] * (LONGEST_SEQUENCE - 8),
        "sampling_params": {"max_tokens": 8, "temperature": 0.7, "logprobs": 0, "ignore_eos": True},
    }
    (choice,) = post(vllm_server, "/inference/v1/generate", asked)["choices"]
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == 8


@pytest.mark.vllm
def test_metrics_tell_of_progress_and_cache_and_an_aborted_request_keeps_its_tokens(vllm_server: RunningServer):
    async def with_client(use: Callable[[ServerClient], Coroutine[Any, Any, Any]]) -> Any:
        async with open_session() as session:
            return await use(ServerClient(vllm_server.address, session=session, api_key=None))

    asked = {
        "request_id": "mine",
        "token_ids": [7] * 4,
        "sampling_params": {"max_tokens": LONGEST_SEQUENCE - 8, "temperature": 0.7, "logprobs": 0, "ignore_eos": True},
    }

    async def draw_and_abort(client: ServerClient) -> tuple[ServerLoad, ServerLoad, dict]:
        before = await client.load()
        drawing = asyncio.ensure_future(client.post("/inference/v1/generate", asked))
        while not drawing.done():
            now = await client.load()
            if now.tokens > before.tokens + 4:  # the prompt, and something of the response
                await client.abort("mine")
                break
        return before, now, await asyncio.wait_for(drawing, 60)

    before, now, answer = asyncio.run(with_client(draw_and_abort))
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "abort"
    assert 0 < len(choice["token_ids"]) == len(choice["logprobs"]["content"]) < LONGEST_SEQUENCE - 8
    assert choice["weight_versions"][-1]["end"] == len(choice["token_ids"])
    assert now.tokens > before.tokens
    assert before.cache_tokens is not None
    assert before.cache_tokens >= LONGEST_SEQUENCE
