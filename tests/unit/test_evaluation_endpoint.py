"""Responses from an endpoint that is slow, refuses, breaks off and answers nonsense."""

import asyncio
import threading

import pytest
from aiohttp import web

from megatron_klear.config.evaluation import EndpointConfig
from megatron_klear.evaluation import chat_api
from megatron_klear.evaluation.benchmarks import Problem
from megatron_klear.evaluation.endpoint import EndpointError, EndpointSource
from megatron_klear.evaluation.protocols import Protocol
from megatron_klear.evaluation.sampling import Wanted


class Standin:
    """An OpenAI-like server on a thread: `faults` are answered first, one a request; then completions."""

    def __init__(self):
        self.faults, self.asked, self.message = [], [], {"content": "It is 4."}
        self.finish, self.under_way, self.most = "stop", 0, 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        assert self._ready.wait(30)

    async def answer(self, request):
        body = await request.json()
        self.asked.append((dict(request.headers), body))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        fault = self.faults.pop(0) if self.faults else None
        if fault == "break":
            request.transport.close()
        if isinstance(fault, int):
            return web.Response(status=fault, text="not now", headers={"Retry-After": "0"})
        if isinstance(fault, str):
            return web.Response(text=fault)
        choice = {"message": self.message, "finish_reason": self.finish}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 5}})

    def _serve(self):
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(chat_api, "_FIRST_PAUSE_SECONDS", 0.001)
    standin = Standin()
    yield standin
    standin.close()


def problem(name):
    return Problem(id=name, messages=({"role": "user", "content": name},), data_source="math", ground_truth="4")


def draw(server, *, names=("a", "b"), samples=3, protocol=None, thinking=None, seed=0, **config):
    config = {"urls": (server.url,), "model": "m", "concurrency": 2, "attempts": 3, "timeout_seconds": 20} | config
    wanted = [Wanted(problem=problem(name), numbers=tuple(range(samples))) for name in names]
    drawn = []
    source = EndpointSource(EndpointConfig(**config), thinking)
    source.draw(wanted, protocol or Protocol(temperature=0.6, top_p=0.95, samples=samples), seed, drawn.extend)
    return drawn


def test_every_response_is_asked_for_once_with_a_seed_of_its_own(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    drawn = draw(server)
    assert {response.key for response in drawn} == {(name, number) for name in "ab" for number in range(3)}
    assert all(response.text == "It is 4." and response.num_tokens == 5 for response in drawn)
    seeds = [body["seed"] for _, body in server.asked]
    assert len(set(seeds)) == 6
    assert server.most <= 2
    headers, body = server.asked[0]
    assert headers["Authorization"] == "Bearer secret"
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["model"]) == (0.6, 0.95, 32768, "m")
    assert "top_k" not in body
    draw(server)
    assert sorted(seeds) == sorted(body["seed"] for _, body in server.asked[6:])


def test_faults_that_pass_cost_no_response(server):
    server.faults = [429, 500, 503, "break", 408]
    drawn = draw(server, attempts=6)
    assert len({response.key for response in drawn}) == len(drawn) == 6
    assert len(server.asked) == 11


def test_what_has_come_is_kept_when_a_server_fails_for_good(server):
    server.faults = [None, None, *[500] * 50]
    with pytest.raises(EndpointError, match=r"did not answer .* in 3 attempts, at last status 500: not now"):
        draw(server, concurrency=1)
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("fault", "words"), [(401, "status 401"), (400, "status 400"), ("{}", "no chat completion"), ("<html>", "no chat")]
)
def test_a_refusal_is_not_asked_again(server, fault, words):
    server.faults = [fault] * 6
    with pytest.raises(EndpointError, match=words):
        draw(server, names="a", samples=1)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_told(server):
    with pytest.raises(EndpointError, match=r"did not answer .* ClientConnectorError"):
        draw(server, urls=("http://127.0.0.1:1/v1",), attempts=2)


@pytest.mark.parametrize("part", ["content", "reasoning_content"])
def test_content_that_is_no_text_is_no_completion(server, part):
    server.message = {part: [{"type": "text", "text": "It is 4."}]}
    with pytest.raises(EndpointError, match="its content is no text"):
        draw(server, names="a", samples=1)
    told = b'{"choices": [{"message": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1e999}}'
    with pytest.raises(EndpointError, match="no chat completion"):
        chat_api.read_completion(told, "said")


def test_other_ends_than_stop_and_length_are_no_response(server):
    server.finish = "content_filter"
    with pytest.raises(EndpointError, match="content_filter"):
        draw(server, names="a", samples=1)


def test_thinking_that_a_server_takes_apart_is_put_in_front(server):
    server.message = {"reasoning_content": "2 and 2", "content": "It is 4."}
    assert draw(server, names="a", samples=1)[0].text == "<think>\n2 and 2\n</think>\n\nIt is 4."
    server.finish, server.message = "length", {"reasoning_content": "2 and", "content": None}
    assert draw(server, names="a", samples=1)[0].text == "<think>\n2 and"


def test_what_openai_lacks_is_sent_or_refused(server):
    protocol = Protocol(temperature=0.6, top_k=20, repetition_penalty=1.05)
    draw(server, names="a", samples=1, protocol=protocol, thinking=False)
    body = server.asked[0][1]
    assert (body["top_k"], body["repetition_penalty"]) == (20, 1.05)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(EndpointError, match=r"endpoint.extensions"):
        draw(server, names="a", samples=1, protocol=protocol, extensions=False)


def test_requests_are_shared_out_over_addresses(server):
    other = Standin()
    draw(server, urls=(server.url, other.url))
    assert len(server.asked) == len(other.asked) == 3
    other.close()


def test_requests_are_spread_over_the_minute():
    pacer = chat_api.Pacer(120)
    assert [pacer.delay_seconds(now) for now in (10.0, 10.0, 10.0, 10.7, 99.0)] == [
        pytest.approx(delay) for delay in (0, 0.5, 1.0, 0.8, 0)
    ]
    free = chat_api.Pacer(None)
    assert [free.delay_seconds(10.0) for _ in range(3)] == [0, 0, 0]


def test_every_try_waits_for_its_turn(server, monkeypatch):
    waited = []

    async def sleep(seconds, **_):
        waited.append(seconds)

    server.faults = [429]
    monkeypatch.setattr(chat_api.asyncio, "sleep", sleep)
    monkeypatch.setattr(chat_api.time, "monotonic", lambda: 10.0)
    draw(server, names="a", samples=2, concurrency=1, max_requests_per_minute=6)
    assert [seconds for seconds in waited if seconds > 1] == [10.0, 20.0]


def test_nothing_is_begun_once_a_request_has_failed_for_good(monkeypatch):
    begun, pause = [], asyncio.sleep

    async def attempt(_, url, body, place):
        begun.append(place)
        refusal = chat_api.RefusedError(url, place, 401, "no") if place == "refused" else None
        return chat_api._Failure("status 500", refusal=refusal)

    async def ask(client, place):
        await client.ask({}, place)

    monkeypatch.setattr(chat_api.ChatClient, "_attempt", attempt)
    monkeypatch.setattr(chat_api.asyncio, "sleep", lambda seconds: pause(0))
    config = EndpointConfig(urls=("http://127.0.0.1:1",), model="m", concurrency=3)
    with pytest.raises(EndpointError, match="refuses refused"):
        chat_api.ask_all(config, ["a", "b", "refused", "later"], ask)
    assert begun == ["a", "b", "refused"]
