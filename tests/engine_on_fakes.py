"""The vLLM engine on fake servers, with a courier that only sends versions."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
from fake_vllm import STOP, VOCAB, FakeServer, response_to, sampling

from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.errors import UserError
from megatron_klear.rollout.engine import Checksums, FinishedGroup, GroupRequest
from megatron_klear.rollout.vllm.client import Portal, ServerClient
from megatron_klear.rollout.vllm.engine import VLLMEngine
from megatron_klear.rollout.vllm.member import Limits
from megatron_klear.rollout.vllm.routes import RouteForm
from megatron_klear.rollout.weights.base import TransferFailed
from megatron_klear.types import Prompt, Sample

FAST = Limits(
    request_seconds=2.0,
    deadline_seconds=10.0,
    requests_per_server=16,
    health_seconds=0.3,
    tick_seconds=0.02,
    backoff_seconds=0.01,
    max_backoff_seconds=0.1,
    max_unsound=100,
)


class FakeCourier:
    """Tells servers the version, through the phases of an update, and notes who was attached."""

    needs_shared_device = False

    def __init__(self) -> None:
        """Nothing is attached."""
        self.attached: list[str] = []
        self.detached: list[str] = []
        self.broken: set[str] = set()
        """Addresses that fail in the middle of an update."""
        self.error: Exception | None = None
        self.closed = False

    def send(self, version: int, servers: Sequence[ServerClient], portal: Portal) -> Checksums:
        """Have the servers take the version."""
        if self.error is not None:
            raise self.error
        held, failures = {}, {}
        for server in servers:
            try:
                if server.url not in self.attached:
                    portal.run(server.post("/init_weight_transfer_engine", {"init_info": {}}, timeout_seconds=1), 5)
                    self.attached.append(server.url)
                portal.run(server.post("/start_weight_update", timeout_seconds=1), 5)
                if server.url in self.broken:
                    raise ValueError("torn")
                portal.run(server.post("/finish_weight_update", {"weight_version": str(version)}, timeout_seconds=1), 5)
                held[f"{server.url} worker 0"] = {"model.norm.weight": "sum"}
            except Exception as error:
                failures[server.url] = repr(error)
        if failures:
            raise TransferFailed(version, failures, held)
        return held

    def detach(self, url: str) -> None:
        """Forget a server."""
        self.detached.append(url)
        self.attached = [one for one in self.attached if one != url]

    def close(self) -> None:
        """Note it."""
        self.closed = True


class FakeServers:
    """Servers that the run started itself, as far as the engine knows them."""

    def __init__(self) -> None:
        """Nothing happened yet."""
        self.came_back: list[str] = []
        self.good: set[str] = set()
        self.restarts: list[str] = []
        self.held: list[bool] = []
        self.looks_until_up = 0
        self.happened: list[str] = []
        self.failure: UserError | None = None
        self.closed = False

    def poll(self) -> list[str]:
        """Addresses that came back."""
        if self.failure is not None:
            raise self.failure
        found, self.came_back = self.came_back, []
        return found

    def notices(self) -> list[str]:
        """What happened."""
        told, self.happened = self.happened, []
        return told

    def answered(self, address: str) -> None:
        """Note it."""
        self.good.add(address)

    def restart(self, address: str) -> None:
        """Note it."""
        self.restarts.append(address)

    @property
    def starting(self) -> bool:
        """True for as many looks as told."""
        self.looks_until_up -= 1
        return self.looks_until_up >= 0

    def hold(self) -> None:
        """Note it."""
        self.held.append(True)

    def release(self) -> None:
        """Note it."""
        self.held.append(False)

    def close(self) -> None:
        """Note it."""
        self.closed = True


@contextmanager
def engine_on(
    servers: Sequence[FakeServer],
    *,
    limits: Limits = FAST,
    version: int | None = 3,
    managed: FakeServers | None = None,
    routes: RouteForm | None = None,
    **settings: object,
) -> Iterator[VLLMEngine]:
    """An engine on the servers, which hold weights of `version` unless it is None."""
    config = VLLMRolloutConfig.model_validate({"servers": [server.url for server in servers]} | settings)
    engine = VLLMEngine(
        config,
        config.servers,
        FakeCourier(),
        decode=lambda tokens: " ".join(map(str, tokens)),
        stop_token_ids=[STOP],
        vocab_size=VOCAB,
        routes=routes,
        servers=managed,
        limits=limits,
    )
    try:
        if version is not None:
            engine.load_weights(version)
        yield engine
    finally:
        engine.close()


def prompt(number: int) -> Prompt:
    """Prompt `number`, which no other is like."""
    tokens = np.array([number % VOCAB, number // VOCAB, 5], dtype=np.int32)
    return Prompt(id=f"p{number}", data_source="s", tokens=tokens, text=f"prompt {number}", ground_truth=None)


def drain(engine: VLLMEngine, requests: Sequence[GroupRequest]) -> list[FinishedGroup]:
    """Submit, and take everything."""
    engine.submit(requests)
    finished: list[FinishedGroup] = []
    while engine.in_flight:
        finished += engine.take(1.0)
    return finished


def assert_whole(finished: FinishedGroup) -> None:
    """The group is exactly what the fake model says to this prompt."""
    request, group = finished.request, finished.group
    assert group is not None, finished.failure
    assert group.prompt is request.prompt
    assert len(group.samples) == len(group.texts) == request.sampling.samples_per_prompt
    for sample, text in zip(group.samples, group.texts, strict=True):
        assert_sample(sample, request.prompt, request.sampling.max_tokens)
        response = sample.tokens[len(request.prompt.tokens) :]
        assert text == " ".join(map(str, response[:-1] if response[-1] == STOP else response))


def assert_sample(sample: Sample, of: Prompt, max_tokens: int) -> None:
    """Tokens, log-probs, finish, mask and version spans of one sample."""
    tokens, logprobs, finish = response_to(of.tokens.tolist(), max_tokens)
    head = len(of.tokens)
    assert sample.tokens.dtype == np.int32
    assert sample.tokens.tolist() == [*of.tokens.tolist(), *tokens]
    assert sample.trained.tolist() == [False] * head + [True] * len(tokens)
    assert sample.logprobs is not None
    assert sample.logprobs.dtype == np.float32
    np.testing.assert_array_equal(sample.logprobs, np.array([0.0] * head + logprobs, dtype=np.float32))
    assert sample.finish == finish
    if sample.version_spans:
        assert len(sample.version_spans) > 1
        assert sample.policy_version == sample.version_spans[0].version
        bounds = [span.start for span in sample.version_spans] + [sample.version_spans[-1].end]
        assert (bounds[0], bounds[-1]) == (head, head + len(tokens))
        assert all(one.end == other.start for one, other in pairwise(sample.version_spans))


def requests(count: int, **changes: int) -> list[GroupRequest]:
    """One request each for ``count`` prompts."""
    return [GroupRequest(prompt=prompt(number), sampling=sampling(**changes), seed=5) for number in range(count)]


def courier_of(engine: VLLMEngine) -> FakeCourier:
    """The fake that takes the engine's weights to its servers."""
    transport = engine._courier
    assert isinstance(transport, FakeCourier)
    return transport


def wait_until(condition, seconds: float = 5.0) -> None:
    """Come back when the condition holds; fail where it does not within the seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.01)
