"""Servers started for a run, with the real vLLM."""

import asyncio
import json
import urllib.request
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from curation_rows import curate, problem, read, write
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
    told = {"backend": "klear_file", "dtype": "float32", "device": "cpu", "base": worker["base"]}
    assert worker == told | {"lora_rank": "0", "lora_targets": ""}
    assert worker["base"] in ("as started", "replaced"), "others of these tests may have sent it weights"
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


@pytest.mark.vllm
def test_a_teacher_is_distilled_and_graded(vllm_server: RunningServer, tmp_path):
    rows = write(tmp_path / "rows.jsonl", *(problem(f"What is {k} + {k}?") for k in range(3)), problem("x " * 900))
    given = ["--input", rows, "--store", tmp_path / "store", "--samples", 2, "--sampling.max-tokens", 12]
    given += ["--endpoint.urls", f"{vllm_server.address}/v1", "--endpoint.model", "policy"]
    given += ["--endpoint.input-price", 1, "--endpoint.output-price", 1, "--endpoint.max-spend", 1]
    given += ["--sampling.top-k", 50, "--sampling.temperature", 1]
    report = curate("distill", *given, "--output", tmp_path / "sft" / "rows.jsonl", "--keep-truncated")
    assert report is not None
    assert report["counts"]["rows"] == 8
    assert report["finishes"]["refused"] == 2  # the long one, with vLLM's own words
    assert "maximum context length" in report["examples"]["refused"][0]["why"]
    assert report["tokens"]["completion"] == 12 * report["finishes"]["length"]
    made = read(tmp_path / "sft" / "rows.jsonl")
    assert len({row["messages"][-1]["content"] for row in made}) == len(made) == 6
    lines = (tmp_path / "store" / "responses.jsonl").read_bytes()
    functions = '{made_up = "math"}'
    output = tmp_path / "rate" / "rows.jsonl"
    rate = curate("filter-pass-rate", *given, "--output", output, "--min-rate", 0, "--reward.functions", functions)
    assert rate is not None
    assert rate["problems_by_passed"]["0"] == 4
    assert (tmp_path / "store" / "responses.jsonl").read_bytes() == lines
