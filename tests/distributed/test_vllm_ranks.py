"""Weights on their way from two ranks to servers: the first alone talks to them, and all take part."""

import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from fake_vllm import VOCAB, FakeServer

from megatron_klear.errors import UserError

TORN = "no memory for a copy of the first weight"


class Transport:
    """Goes through the weights on every rank; on the first, tells the servers of them."""

    needs_shared_device = False

    def __init__(self, error: str = "", wrong: bool = False, unfit: str = "") -> None:
        self.error, self.wrong, self.unfit, self.detached, self.closed = error, wrong, unfit, [], False

    async def attach(self, servers) -> None:
        if self.unfit:
            raise UserError(self.unfit)
        for server in servers:
            await server.post("/init_weight_transfer_engine", {"init_info": {}}, timeout_seconds=1)

    def send(self, weights, version, servers, portal):
        from megatron_klear.rollout.weights.checksum import checksum

        held = {}
        for name, tensor in weights:
            held[name] = checksum(tensor + self.wrong)
            if portal is not None and self.error == TORN:
                raise RuntimeError(self.error)
        if portal is None:
            return {}
        if self.error:
            raise UserError(self.error)
        return {f"{server.url} worker 0": held for server in servers}

    def detach(self, url: str) -> None:
        self.detached.append(url)

    def close(self) -> None:
        self.closed = True


def opened(url: str, transport: Transport):
    """The trainer's side of two ranks, whose engine is a tensor."""
    import torch
    import torch.distributed as dist

    from megatron_klear.config.rollout import VLLMRolloutConfig
    from megatron_klear.rollout.vllm.open import Access
    from megatron_klear.train import weight_sync

    weight_sync.open_transport = lambda *_, **__: transport

    def gathered():
        for name in ("model.norm.weight", "lm_head.weight"):
            whole = torch.full((2,), 0.5)
            dist.all_reduce(whole)  # as tensor-parallel ranks gather a weight together
            yield name, whole

    engine = SimpleNamespace(
        hf_weights=gathered,
        architecture=SimpleNamespace(vocab_size=VOCAB),
        run=SimpleNamespace(model=SimpleNamespace(dtype="fp32"), lora=None),
        topology=SimpleNamespace(device=torch.device("cpu"), rank=dist.get_rank(), size=2),
        logprobs=lambda batches: [torch.full_like(batches[0].weights, -1.0)],
    )
    trainer = weight_sync.ServersWeights(engine, VLLMRolloutConfig(servers=(url,)))
    trainer.connect(Access(addresses=(url,), api_key=None) if dist.get_rank() == 0 else None)
    return trainer


def deliver(url: str, gone: list[str]) -> tuple[tuple[str, ...], list[str], dict]:
    """Who holds weights, who was forgotten, and what of the servers did not get them."""
    transport = Transport()
    trainer = opened(url, transport)
    try:
        delivery = trainer.deliver(3, [url], gone)
        trainer.check_echo(3, {url: np.full(63, -1.0, dtype=np.float32)})
        with pytest.raises(UserError, match=r"differ by 0.5 nats .* Some of its weights are stale"):
            trainer.check_echo(3, {url: np.full(63, -1.5, dtype=np.float32)})
        return delivery.holders, transport.detached, dict(delivery.failures)
    finally:
        trainer.close()
        assert transport.closed


def failing(url: str, error: str, wrong: bool, unfit: str) -> str:
    """What each rank raises when the first one's transport fails, or servers are unfit or hold other weights."""
    trainer = opened(url, Transport(error, wrong, unfit))
    try:
        with pytest.raises((UserError, RuntimeError)) as caught:
            trainer.deliver(3, [url], [])
        return str(caught.value)
    finally:
        trainer.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


def test_the_first_rank_talks_to_servers_and_all_take_part(ranks, server: FakeServer):
    first, second = ranks(2, deliver, server.url, ["http://gone"])
    assert first == ((f"{server.url} worker 0",), ["http://gone"], {})
    assert second == ((), [], {})


def test_a_server_that_does_not_answer_costs_only_itself(ranks):
    (holders, _, failures), _ = ranks(2, deliver, "http://127.0.0.1:9", [])
    assert holders == ()
    assert list(failures) == ["http://127.0.0.1:9"]


@pytest.mark.parametrize(
    ("error", "wrong", "unfit", "told"),
    [
        ("no room for buckets", False, "", "no room for buckets"),
        (TORN, False, "", TORN),
        ("", True, "", "does not hold the trainer's weights"),
        ("", False, "started with another backend", "started with another backend"),
    ],
)
def test_a_failure_of_the_first_rank_is_raised_on_all(
    ranks, server: FakeServer, error: str, wrong: bool, unfit: str, told: str
):
    start = time.monotonic()
    assert all(told in said for said in ranks(2, failing, server.url, error, wrong, unfit))
    assert time.monotonic() - start < 30
