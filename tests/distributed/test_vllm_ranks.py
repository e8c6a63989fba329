"""The vLLM engine on two ranks: the first talks to servers, and all of them get the same."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
from engine_on_fakes import FAST, FakeTransport, prompt, weights
from fake_vllm import STOP, VOCAB, FakeServer, sampling

from megatron_klear.errors import UserError


def two_syncs(url: str) -> tuple[list, list, dict, dict]:
    """On each rank: weights, probe, generate, weights asked for in the middle, generate again."""
    import torch
    import torch.distributed as dist

    from megatron_klear.config.rollout import VLLMRolloutConfig
    from megatron_klear.rollout.vllm.engine import VLLMEngine

    rank = dist.get_rank()
    engine = VLLMEngine(
        VLLMRolloutConfig(servers=(url,)),
        [url],
        FakeTransport(),
        decode=str,
        stop_token_ids=[STOP],
        vocab_size=VOCAB,
        dtype=torch.float32,
        rank=rank,
        limits=FAST,
    )
    try:
        assert engine.is_submitter == (rank == 0)
        checksums = engine.load_weights(weights(), 3)
        probed = engine.probe(np.array([1, 2, 3], dtype=np.int32))
        prompts = [prompt(number) for number in range(4)]
        groups = engine.generate(prompts, sampling(), seed=1)
        if rank == 0:
            engine._fleet.lose(engine._fleet.members[0])
        with pytest.raises(UserError, match="no rollout server holds the present weights"):
            engine.generate(prompts, sampling(), seed=1)
        engine.load_weights(weights(), 4)
        again = engine.generate(prompts, sampling(), seed=1)
        versions = [sample.policy_version for group in again for sample in group.samples]
        assert versions == [4] * (8 if rank == 0 else 0)
        return [group.texts for group in groups], [group.texts for group in again], checksums, probed
    finally:
        engine.close()


def failing_sync(url: str) -> str:
    """What each rank raises when the first one's transport fails."""
    import torch
    import torch.distributed as dist

    from megatron_klear.config.rollout import VLLMRolloutConfig
    from megatron_klear.rollout.vllm.engine import VLLMEngine

    transport = FakeTransport()
    transport.error = UserError("no room for buckets")
    engine = VLLMEngine(
        VLLMRolloutConfig(servers=(url,)),
        [url],
        transport,
        decode=str,
        stop_token_ids=[STOP],
        vocab_size=VOCAB,
        dtype=torch.float32,
        rank=dist.get_rank(),
        limits=FAST,
    )
    try:
        with pytest.raises(UserError) as caught:
            engine.load_weights(weights(), 3)
        return str(caught.value)
    finally:
        engine.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


def test_the_first_rank_gets_the_groups_and_all_the_proof(ranks, server: FakeServer):
    first, second = ranks(2, two_syncs, server.url)
    assert first[0] == first[1]
    assert len(first[0]) == 4
    assert second[:2] == ([], [])
    assert first[2] == second[2]
    assert list(first[2]) == [f"{server.url} worker 0"]
    np.testing.assert_array_equal(first[3][server.url], second[3][server.url])


def test_a_failure_of_the_first_rank_is_raised_on_all(ranks, server: FakeServer):
    start = time.monotonic()
    assert ranks(2, failing_sync, server.url) == ["no room for buckets"] * 2
    assert time.monotonic() - start < 30
    assert not server.paused
