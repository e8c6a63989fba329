"""One server's client: what comes back is a sample to the letter, or an error."""

import asyncio
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from fake_vllm import ANSWER_FAULTS, CUTS, REFUSALS, STOP, VOCAB, FakeServer, response_to, sampling, token_after
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rollout.vllm.answers import Malformed, read_completion
from megatron_klear.rollout.vllm.client import (
    Completion,
    GarbageAnswer,
    Portal,
    ServerClient,
    ServerError,
    WrongWeights,
    open_session,
)

PROMPT = [3, 1, 4]
SEEN_ELSEWHERE = ("newer", "older")  # well-formed; only who sent the weights can tell
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "token_ids", "logprobs", "content", "finish_reason", "weight_versions", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        fake.version = "3"
        yield fake


def call(server: FakeServer, use: Any, **client: Any) -> Any:
    """Run `use(client)` with a client of the server."""

    async def run() -> Any:
        async with open_session() as session:
            arguments = {"api_key": None, "vocab_size": VOCAB} | client
            return await use(ServerClient(server.url, session=session, **arguments))

    return asyncio.run(run())


def generate(client: ServerClient, seconds: float = 5.0, **changes: Any) -> Coroutine[Any, Any, Completion]:
    settings = sampling(max_tokens=20).model_copy(update=changes)
    return client.generate(PROMPT, sampling=settings, seed=1 << 62, stop_token_ids=[STOP], timeout_seconds=seconds)


def test_a_response_is_what_the_server_drew(server: FakeServer):
    tokens, logprobs, finish = response_to(PROMPT, 20)
    got = call(server, generate)
    assert got.token_ids.dtype == np.int32
    assert got.logprobs.dtype == np.float32
    assert got.token_ids.tolist() == tokens
    np.testing.assert_array_equal(got.logprobs, np.array(logprobs, dtype=np.float32))
    assert got.finish == finish
    assert [tuple(span) for span in got.version_spans] == [(3, 0, len(tokens))]


def test_the_request_asks_for_the_distribution_sampled_from(server: FakeServer):
    call(server, lambda client: generate(client, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(9,)))
    sent = server.requests[0]
    assert sent["token_ids"] == PROMPT
    wanted = {"n": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 20, "seed": 1 << 62, "logprobs": 0}
    assert wanted.items() <= sent["sampling_params"].items()
    assert sent["sampling_params"]["stop_token_ids"] == [STOP, 9]
    assert sent["sampling_params"]["ignore_eos"] is True


def test_greedy_tokens_have_log_prob_0(server: FakeServer):
    assert not call(server, lambda client: generate(client, temperature=0.0)).logprobs.any()


def test_prompt_log_probs(server: FakeServer):
    got = call(server, lambda client: client.prompt_logprobs(np.array([3, 1, 4, 1], dtype=np.int32)))
    assert got.dtype == np.float32
    assert got.tolist() == pytest.approx([token_after([3, 1, 4, 1][:place])[1] for place in (1, 2, 3)])


@pytest.mark.parametrize("fault", [fault for fault in ANSWER_FAULTS if fault not in SEEN_ELSEWHERE])
def test_an_answer_that_cannot_be_right_is_an_error(server: FakeServer, fault: str):
    server.faults = iter([fault])
    with pytest.raises(GarbageAnswer) as caught:
        call(server, generate)
    assert isinstance(caught.value, WrongWeights) == (fault == "started_anew")
    assert server.url in str(caught.value)


@pytest.mark.parametrize("fault", [*REFUSALS, *CUTS])
def test_no_answer_is_an_error_within_the_timeout(server: FakeServer, fault: str):
    server.faults = iter([fault])
    start = time.monotonic()
    with pytest.raises(ServerError) as caught:
        call(server, lambda client: generate(client, 0.5))
    assert time.monotonic() - start < 3
    assert not isinstance(caught.value, GarbageAnswer)
    assert (caught.value.status is None) == (fault in CUTS)
    assert not caught.value.is_refusal


def test_a_server_that_is_gone(server: FakeServer):
    server.kill()
    with pytest.raises(ServerError) as caught:
        call(server, generate)
    assert caught.value.status is None
    assert not call(server, lambda client: client.healthy())


def test_a_request_that_is_at_fault_is_told_apart(server: FakeServer):
    server.faults = iter(["bad_request"])
    with pytest.raises(ServerError) as caught:
        call(server, generate)
    assert caught.value.is_refusal


def test_the_key_is_sent(server: FakeServer):
    server.api_key = "secret"
    assert call(server, generate, api_key="secret").token_ids.size
    with pytest.raises(ServerError) as caught:
        call(server, generate)
    assert caught.value.status == 401


def test_an_aborted_response_is_read_as_far_as_it_goes(server: FakeServer):
    server.faults = iter(["abort"])
    whole = response_to(PROMPT, 20)[0]
    got = call(server, generate)
    assert got.finish == "abort"
    assert got.token_ids.tolist() == whole[: len(whole) // 2]


@pytest.mark.parametrize("tokens", [[1, 2, STOP], [1, 2, 3]])
@pytest.mark.parametrize("finish", ["stop", "length", "abort"])
def test_the_last_token_says_whether_a_response_of_full_length_stopped(finish: str, tokens: list[int]):
    content = [{"token_id": token, "logprob": -1.0} for token in tokens]
    span = {"version": "3", "start": 0, "end": 3}
    answer = {"finish_reason": finish, "token_ids": tokens, "logprobs": {"content": content}, "weight_versions": [span]}

    def read() -> str:
        return read_completion({"choices": [answer]}, max_tokens=3, vocab_size=VOCAB, stop=frozenset([STOP])).finish

    right = "stop" if tokens[-1] == STOP else "length"
    if finish == "abort":
        assert read() == ("stop" if right == "stop" else "abort")
    elif finish == right:
        assert read() == right
    else:
        with pytest.raises(Malformed, match="stop token"):
            read()


@given(answer=JSON)
def test_whatever_comes_is_read_or_refused(answer: Any):
    # Nothing but Malformed may come out: any other error would end the run.
    try:
        read = read_completion(answer, max_tokens=5, vocab_size=VOCAB, stop=frozenset([STOP]))
    except Malformed:
        return
    assert len(read.token_ids) == len(read.logprobs) <= 5


@pytest.mark.parametrize(
    ("key", "value"),
    [("logprob", -(10**400)), ("logprob", True), ("logprob", -9999.0), ("version", "9" * 5000), ("version", "²")],
)
def test_numbers_beyond_all_bounds_are_refused(key: str, value: Any):
    entry = {"token_id": 1, "logprob": -1.0}
    span = {"version": "3", "start": 0, "end": 1}
    answer = {"finish_reason": "length", "token_ids": [1], "logprobs": {"content": [entry]}, "weight_versions": [span]}

    def read() -> None:
        read_completion({"choices": [answer]}, max_tokens=1, vocab_size=VOCAB, stop=frozenset())

    read()
    (entry if key == "logprob" else span)[key] = value
    with pytest.raises(Malformed):
        read()


def test_the_portal_runs_coroutines_and_gives_up_in_time():
    portal = Portal()

    async def answer() -> int:
        await asyncio.sleep(0.01)
        return 5

    assert portal.run(answer()) == 5
    with pytest.raises(TimeoutError):
        portal.run(asyncio.sleep(60), timeout=0.05)
    under_way = portal.start(asyncio.sleep(60))
    portal.close()
    portal.close()
    assert under_way.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        portal.run(answer())
