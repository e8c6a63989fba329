"""Adapters sent to servers by themselves: files, names and versions on fakes, and settings that cannot work."""

import asyncio
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_receiver import FakeReceiver, Receivers
from fake_vllm import FakeServer, sampling
from rl_groups import gppo_config

from megatron_klear.config.checks_rollout import Served, check_rollout
from megatron_klear.data.tiny import write_tiny_model
from megatron_klear.errors import UserError
from megatron_klear.models.architecture import read_architecture
from megatron_klear.models.peft import AdapterForm, tensor_name
from megatron_klear.rollout.servers.command import run_commands
from megatron_klear.rollout.vllm.client import ADAPTER_NAME, ServerClient, open_session
from megatron_klear.rollout.weights.adapter import AdapterTransport
from megatron_klear.rollout.weights.base import TransferFailed
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.rollout.weights.files import BucketFolder

FORM = AdapterForm(rank=4, alpha=8.0, targets=("q_proj",))
PHASES = ["klear_begin_update", "klear_load_adapter", "update_weight_version", "reset_prefix_cache", "klear_checksums"]


@pytest.fixture
def receivers():
    receivers = Receivers()
    yield receivers
    receivers.close()


def adapters(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    matrix = "model.layers.0.self_attn.q_proj"
    return {
        tensor_name(matrix, "A"): torch.randn(4, 6, generator=generator),
        tensor_name(matrix, "B"): torch.randn(8, 4, generator=generator),
    }


def transport_in(folder: Path, dtype: torch.dtype = torch.float32) -> AdapterTransport:
    return AdapterTransport(BucketFolder(folder, durable=False), FORM, dtype=dtype, timeout_seconds=20.0)


def fit(**options: Any) -> FakeReceiver:
    receiver = FakeReceiver(**options)
    receiver.description["lora_rank"] = "8"
    return receiver


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_worker_has_the_adapter_and_the_servers_know_it_by_one_name(receivers, tmp_path, dtype):
    both = [fit(dtype=str(dtype).removeprefix("torch."), workers=2) for _ in range(2)]
    clients, transport = [receivers.add(one) for one in both], transport_in(tmp_path, dtype)
    receivers.portal.run(transport.attach(clients))
    for version in (0, 1):
        sent = adapters(version)
        held = transport.send(iter(sent.items()), version, clients, receivers.portal)
        expected = {name: checksum(tensor.to(dtype)) for name, tensor in sent.items()}
        assert held == {f"{client.url} worker {n}": expected for client in clients for n in range(2)}
        assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
    for one in both:
        named = [*PHASES[:2], "load_lora_adapter", *PHASES[2:]]
        assert one.routes == ["klear_describe", *named, *PHASES]
        assert [body["new_version"] for route, body in one.calls if route == "update_weight_version"] == ["0", "1"]
        assert (one.adapter, one.form["r"], one.form["lora_alpha"]) == (ADAPTER_NAME, 4, 8.0)
    transport.close()


def test_a_server_that_was_started_again_is_told_the_name_again(receivers, tmp_path):
    server = fit()
    client, transport = receivers.add(server), transport_in(tmp_path)
    receivers.portal.run(transport.attach([client]))
    transport.send(iter(adapters(0).items()), 0, [client], receivers.portal)
    transport.detach(client.url)
    server.adapter = None
    receivers.portal.run(transport.attach([client]))
    transport.send(iter(adapters(1).items()), 1, [client], receivers.portal)
    assert server.adapter == ADAPTER_NAME
    # One that outlived its trainer knows it already.
    transport = transport_in(tmp_path / "next")
    receivers.portal.run(transport.attach([client]))
    transport.send(iter(adapters(2).items()), 2, [client], receivers.portal)
    assert server.routes.count("load_lora_adapter") == 3


def test_a_full_disk_gives_the_update_up_and_leaves_no_file(receivers, tmp_path):
    client, transport = receivers.add(fit()), transport_in(tmp_path)
    receivers.portal.run(transport.attach([client]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(TransferFailed, match="could not be written"):
            transport.send(
                iter({name: torch.ones(100, 100) for name in adapters(1)}.items()), 1, [client], receivers.portal
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
    transport.close()


@pytest.mark.parametrize("phase", ["klear_load_adapter", "load_lora_adapter", "update_weight_version"])
def test_a_server_that_fails_costs_itself_alone(receivers, tmp_path, phase: str):
    from aiohttp import web

    def fail(name: str, _: Any) -> None:
        if name == phase:
            raise web.HTTPInternalServerError(text="out of memory")

    bad, good = fit(), fit()
    bad.fault = fail
    clients, transport = [receivers.add(one) for one in (bad, good)], transport_in(tmp_path)
    receivers.portal.run(transport.attach(clients))
    with pytest.raises(TransferFailed, match="out of memory") as raised:
        transport.send(iter(adapters(3).items()), 3, clients, receivers.portal)
    assert list(raised.value.failures) == [clients[0].url]
    assert list(raised.value.checksums) == [f"{clients[1].url} worker 0"]


def test_ranks_without_servers_only_take_part_in_gathering():
    drawn = iter(adapters(0).items())
    transport = AdapterTransport(None, FORM, dtype=torch.float32, timeout_seconds=1.0)
    assert transport.send(drawn, 0, (), None) == {}
    assert next(drawn, None) is None


def test_a_server_without_room_for_the_rank_is_refused(receivers, tmp_path):
    client = receivers.add(FakeReceiver())
    with pytest.raises(UserError, match=r"takes adapters up to rank 0.*--max-lora-rank"):
        receivers.portal.run(transport_in(tmp_path).attach([client]))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"lora_targets": "o_proj"}, r"puts adapters on o_proj alone, and .* sends q_proj as well"),
        ({"base": "replaced"}, r"was sent whole weights since it was started"),
    ],
)
def test_a_server_of_others_that_would_compute_another_model_is_refused(receivers, tmp_path, told, words):
    server = fit()
    server.description |= told
    with pytest.raises(UserError, match=words):
        receivers.portal.run(transport_in(tmp_path).attach([receivers.add(server)]))
    server.description |= {"lora_targets": "o_proj q_proj", "base": "as started"}
    receivers.portal.run(transport_in(tmp_path).attach([receivers.add(server)]))


def test_requests_are_for_the_model_with_the_adapter():
    async def ask(server: FakeServer) -> None:
        async with open_session() as session:
            client = ServerClient(server.url, session=session, api_key=None, model=ADAPTER_NAME)
            await client.generate([3, 1], sampling=sampling(), seed=1, stop_token_ids=[7])

    with FakeServer() as server:
        server.version = "3"
        asyncio.run(ask(server))
        assert server.requests[0]["model"] == ADAPTER_NAME


REFUSED = {
    'rollout.kind = "local" draws from whole weights': {"rollout": {"kind": "local"}},
    "rollout.transfer = nccl does not": {"rollout": {"transfer": "nccl"}},
    "model.weights = random is another one": {"model": {"weights": "random"}},
    "model.checkpoint = old is another one": {"model": {"checkpoint": "old"}},
    "up to rank 512": {"lora": {"rank": 513}},
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_what_cannot_be_sent_is_refused(tmp_path: Path, words: str):
    base = {
        "model": {"weights": "pretrained"},
        "lora": {"rank": 12, "sync": "adapter"},
        "rollout": {"kind": "vllm", "servers": ["http://a:1"], "server": {"device": "cpu"}},
    }
    model = write_tiny_model(tmp_path / "model", weights=False)

    def told(**changed: Any) -> list[str]:
        tables = {name: base.get(name, {}) | changed.get(name, {}) for name in {*base, *changed}}
        if changed.get("rollout", {}).get("kind") == "local":
            tables["rollout"] = {"kind": "local"}
        return check_rollout(gppo_config(model, tables), read_architecture(model), 1)

    assert told() == []
    assert [words in one for one in told(**REFUSED[words])] == [True], told(**REFUSED[words])
    merged = {**REFUSED[words], "lora": {**REFUSED[words].get("lora", {}), "sync": "merged"}}
    assert not any("lora.sync" in one for one in told(**merged))


def test_experts_are_refused_and_servers_are_started_for_the_rank(tmp_path: Path):
    tables = {
        "model": {"weights": "pretrained"},
        "lora": {"rank": 12, "sync": "adapter"},
        "rollout": {"kind": "vllm", "server": {"device": "cpu", "python": "/env/bin/python"}},
    }
    config = gppo_config(write_tiny_model(tmp_path / "moe", "qwen3_moe", weights=False), tables)
    assert any("on its experts too" in one for one in check_rollout(config, read_architecture(config.model.path), 1))
    config = gppo_config(write_tiny_model(tmp_path / "model", weights=False), tables)
    (command,) = run_commands(
        config.rollout, Served.by(config, read_architecture(config.model.path)), [1], api_key=None
    )
    words = command.arguments
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert "--enable-lora" in words
    assert words[words.index("--lora-target-modules") + 1 :][:2] == ("q_proj", "k_proj")
    assert not {"lm_head", "all"} & set(words)
    assert command.variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
