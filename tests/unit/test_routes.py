"""Routes of the sampler on their way: read from a server, packed, sent to the rank that trains them, asked for."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_on_fakes import assert_whole, drain, engine_on, prompt
from fake_vllm import ROUTE_FAULTS, ROUTES, VOCAB, FakeServer, routes_of, sampling
from rl_groups import fixed_groups, gppo_config, with_routes

from megatron_klear.config.checks_experts import check_experts
from megatron_klear.config.checks_rollout import Served, check_rollout
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.data.pack import pack
from megatron_klear.data.tiny import write_tiny_model
from megatron_klear.models.architecture import read_architecture
from megatron_klear.orchestrator.step_numbers import TokenArrays
from megatron_klear.rollout.engine import GroupRequest
from megatron_klear.rollout.servers.command import run_commands
from megatron_klear.rollout.vllm.client import GarbageAnswer, ServerClient, open_session
from megatron_klear.rollout.vllm.routes import RouteForm

WAYS = {"answer": ROUTES, "worker": replace(ROUTES, kept_by_worker=True)}


def requests(count: int, **changes: int) -> list[GroupRequest]:
    return [GroupRequest(prompt=prompt(number), sampling=sampling(**changes), seed=5) for number in range(count)]


def assert_routed(samples: list[Any]) -> None:
    """Every token but the last has the experts that the fake model sends it through."""
    for sample in samples:
        assert sample.routes.dtype == np.uint8
        np.testing.assert_array_equal(sample.routes, routes_of(sample.tokens[:-1].tolist()))


@pytest.mark.parametrize("way", list(WAYS))
def test_every_token_of_a_response_has_its_routes(way: str):
    with FakeServer() as server, engine_on([server], routes=WAYS[way]) as engine:
        server.routes = way
        for finished in drain(engine, requests(6)):
            assert_whole(finished)
            assert_routed(finished.group.samples)


@pytest.mark.parametrize("way", list(WAYS))
def test_a_response_of_several_parts_keeps_the_routes_of_each(way: str):
    """The last token of a part is read by the next one, whose server is asked for nothing before it."""
    faults = iter(["abort", "abort", "oom", *[""] * 3, "abort"] * 20)
    with FakeServer(faults=faults) as server, engine_on([server], routes=WAYS[way]) as engine:
        server.routes = way
        for finished in drain(engine, requests(6, max_tokens=40)):
            assert_whole(finished)
            assert_routed(finished.group.samples)
        asked = [len(one["token_ids"]) for one in server.requests]
        left_out = [one["sampling_params"].get("routed_experts_prompt_start", 0) for one in server.requests]
        assert {places - start for places, start in zip(asked, left_out, strict=True) if start} == {1}
        assert any(left_out)


def test_tokens_of_two_versions_keep_their_own_routes():
    with FakeServer(token_seconds=0.01) as server, engine_on([server], routes=ROUTES) as engine:
        server.routes = "answer"
        engine.submit(requests(4, max_tokens=60))
        engine.take(0.05)
        engine.load_weights(4)
        samples = []
        while engine.in_flight:
            samples += [sample for one in engine.take(1.0) for sample in one.group.samples]
    assert any(sample.version_spans for sample in samples)
    assert_routed(samples)


@pytest.mark.parametrize("fault", ROUTE_FAULTS)
def test_routes_that_cannot_be_are_no_sample(fault: str):
    async def ask(server: FakeServer) -> None:
        async with open_session() as session:
            client = ServerClient(server.url, session=session, api_key=None, vocab_size=VOCAB, routes=ROUTES)
            await client.generate([3, 1, 4], sampling=sampling(), seed=1, stop_token_ids=[7])

    with FakeServer(faults=iter([fault])) as server:
        server.version, server.routes = "3", "answer"
        with pytest.raises(GarbageAnswer, match="routed_experts"):
            asyncio.run(ask(server))


def test_a_row_has_the_routes_of_reading_its_tokens():
    samples = [with_routes(sample, experts=300) for group in fixed_groups(2, 3) for sample in group.samples]
    arrays = TokenArrays.of(dict(enumerate(samples)))
    assert arrays.routes.nbytes == 2 * 4 * 2 * sum(len(sample.tokens) - 1 for sample in samples)
    batch = pack(list(arrays.samples().values()), [1.0] * len(samples))
    assert batch.sampler_routes.shape == (batch.num_tokens, 4, 2)
    for sample, end in zip(samples, batch.cu_seqlens[1:].tolist(), strict=True):
        rows = batch.sampler_routes[end - len(sample.tokens) : end].numpy()
        np.testing.assert_array_equal(rows[:-1], sample.routes)
        assert (rows[-1] == -1).all()
        assert batch.weights[end - 1] == 0, "no loss reads what the last token leads to"
    with pytest.raises(ValueError, match="some samples have the sampler's routes and others have none"):
        TokenArrays.of({0: samples[0], 1: replace(samples[1], routes=None)})
    with pytest.raises(ValueError, match="carry routes and some do not"):
        pack([samples[0], replace(samples[1], routes=None)], [1.0, 1.0])
    with pytest.raises(ValueError, match="tokens and routes of"):
        pack([replace(samples[1], routes=samples[1].routes[1:])], [1.0])


def replaying(folder: Path, family: str, **tables: Any) -> GPPOConfig:
    model = write_tiny_model(folder / family, family, weights=False, force=True)
    return gppo_config(model, tables | {"algorithm": {"router_replay": "sampler"}})


def test_what_cannot_be_replayed_is_refused(tmp_path: Path):
    dense = replaying(tmp_path, "qwen3")
    told = check_experts(dense, read_architecture(dense.model.path), 1)
    assert told == ["algorithm.router_replay is set, and the qwen3 model has no experts; leave it out"]
    servers = {"kind": "vllm", "servers": ["http://a:1"], "router": "http://r:1"}
    cases = {
        "behind rollout.router nobody knows": servers | {"server": {"device": "cpu"}},
        "has --no-enable-prefix-caching; leave it out": servers
        | {"server": {"device": "cuda", "arguments": ["--no-enable-prefix-caching"]}},
        "has --enable-prefix-caching; leave it out": servers
        | {"router": None, "server": {"device": "cpu", "arguments": ["--enable-prefix-caching"]}},
    }
    for words, rollout in cases.items():
        config = replaying(tmp_path, "qwen3_moe", rollout=rollout)
        told = check_rollout(config, read_architecture(config.model.path), 1)
        assert [words in one for one in told] == [True], told
        free = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"router_replay": "none"})})
        assert check_rollout(free, read_architecture(config.model.path), 1) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_servers_are_started_so_that_they_tell_routes(tmp_path: Path, device: str):
    server = {"device": device, "python": "/env/bin/python"}
    config = replaying(tmp_path, "qwen3_moe", rollout={"kind": "vllm", "server": server})
    served = Served.by(config, read_architecture(config.model.path))
    (command,) = run_commands(config.rollout, served, [8000], api_key=None)
    assert ("--enable-return-routed-experts" in command.arguments) is (device == "cuda")
    assert ("--no-enable-prefix-caching" in command.arguments) is (device == "cpu")
    assert command.variables.get("KLEAR_KEEP_ROUTES") == ("1" if device == "cpu" else None)
    (plain,) = run_commands(config.rollout, replace(served, routes=False), [8000], api_key=None)
    assert len(command.arguments) == len(plain.arguments) + 1
    assert RouteForm.of(served.architecture, kept_by_worker=False) == RouteForm(layers=4, experts=8, chosen=2)
