"""The vLLM engine on fake servers: spread, weights, pauses, and what it gives back."""

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from engine_on_fakes import (
    FAST,
    FakeServers,
    assert_whole,
    courier_of,
    drain,
    engine_on,
    prompt,
    requests,
    wait_until,
)
from fake_vllm import FakeServer, sampling, token_after

from megatron_klear.errors import UserError
from megatron_klear.rollout.engine import GroupRequest
from megatron_klear.rollout.vllm.client import ServerClient, WrongWeights
from megatron_klear.rollout.vllm.dispatch import sample_seed
from megatron_klear.rollout.vllm.engine import WeightsNeeded
from megatron_klear.rollout.vllm.fleet import Fleet


def test_generate_gives_whole_groups_in_order(servers: list[FakeServer]):
    prompts = [prompt(number) for number in range(20)]
    with engine_on(servers) as engine:
        groups = engine.generate(prompts, sampling(count=3), seed=1)
        assert [group.prompt.id for group in groups] == [one.id for one in prompts]
        for group in groups:
            assert {sample.policy_version for sample in group.samples} == {3}
            assert_whole_group(group, prompts)
        assert engine.counters() == {"server_retries": 0.0, "groups_dropped": 0.0}
        assert all(len(server.requests) > 10 for server in servers), "both servers work"


def assert_whole_group(group, prompts) -> None:
    from megatron_klear.rollout.engine import FinishedGroup

    request = GroupRequest(prompt=group.prompt, sampling=sampling(count=3), seed=1)
    assert_whole(FinishedGroup(request=request, group=group))


def test_every_sample_has_its_own_seed_of_63_bits():
    seeds = {
        sample_seed(seed, name, number, done)
        for seed in (0, 1)
        for name in ("a", "b")
        for number in range(8)
        for done in (0, 5)
    }
    assert len(seeds) == 64
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sample_seed(1, "a", 2) == sample_seed(1, "a", 2)


def test_requests_have_no_seed_where_none_is_wanted(servers: list[FakeServer]):
    with engine_on(servers, seed_requests=False) as engine:
        for finished in drain(engine, requests(4)):
            assert_whole(finished)
    asked = [request["sampling_params"] for server in servers for request in server.requests]
    assert len(asked) == 8
    assert not any("seed" in parameters for parameters in asked)


def test_a_prompt_that_comes_twice_gets_different_seeds(servers: list[FakeServer]):
    with engine_on(servers) as engine:
        assert len(engine.generate([prompt(1)] * 3, sampling(), seed=1)) == 3
    seeds = [request["sampling_params"]["seed"] for server in servers for request in server.requests]
    assert len(set(seeds)) == 6


def test_requests_go_where_the_fewest_tokens_are_outstanding(servers: list[FakeServer]):
    slow, fast = servers
    slow.token_seconds, fast.token_seconds = 0.05, 0.001
    with engine_on(servers) as engine:
        for finished in drain(engine, requests(30)):
            assert_whole(finished)
    assert len(fast.requests) > len(slow.requests)
    assert slow.most_running <= 16


def test_submit_returns_at_once_and_take_waits_no_longer_than_told(servers: list[FakeServer]):
    for server in servers:
        server.token_seconds = 0.03
    with engine_on(servers) as engine:
        start = time.monotonic()
        assert engine.take(5.0) == []
        engine.submit(requests(4))
        assert engine.take(0.0) == []
        assert time.monotonic() - start < 0.5
        assert engine.in_flight == 4
        found = []
        while engine.in_flight:
            found += engine.take(1.0)
        assert sorted(one.request.prompt.id for one in found) == ["p0", "p1", "p2", "p3"]


def test_generate_leaves_submitted_requests_alone(servers: list[FakeServer]):
    with engine_on(servers) as engine:
        engine.submit(requests(5))
        assert len(engine.generate([prompt(50)], sampling(), seed=1)) == 1
        assert engine.in_flight == 5
        assert len(drain(engine, [])) == 5


def test_no_request_goes_out_before_the_weights(servers: list[FakeServer]):
    with engine_on(servers, version=None) as engine:
        assert not engine.needs_weights
        with pytest.raises(RuntimeError, match="load_weights"):
            engine.generate([prompt(1)], sampling(), seed=1)
        engine.submit(requests(2))
        assert engine.take(0.3) == []
        assert not any(server.requests for server in servers)
        checksums = engine.load_weights(0)
        assert sorted(checksums) == sorted(f"{server.url} worker 0" for server in servers)
        for finished in drain(engine, []):
            assert_whole(finished)


def test_an_update_pauses_every_server_and_lets_it_go_on(servers: list[FakeServer]):
    with engine_on(servers) as engine:
        engine.load_weights(4)
    for server in servers:
        once = ["/pause keep", "/start_weight_update", "/finish_weight_update", "/resume"]
        assert server.control == [once[0], "/init_weight_transfer_engine", *once[1:], *once]
        assert not server.paused


def test_responses_under_way_go_on_with_the_new_weights(servers: list[FakeServer]):
    for server in servers:
        server.token_seconds = 0.03
    with engine_on(servers) as engine:
        engine.submit(requests(6, max_tokens=30))
        time.sleep(0.2)
        engine.load_weights(4)
        finished = drain(engine, [])
        for one in finished:
            assert_whole(one)
        several = [sample for one in finished if one.group for sample in one.group.samples if sample.version_spans]
        assert several, "some responses were under way"
        for sample in several:
            assert [span.version for span in sample.version_spans] == [3, 4]
        assert engine.counters()["server_retries"] == 0


class Unasked(ServerClient):
    """A server that gets no request."""

    def __init__(self) -> None:
        self.url = "http://a"


@pytest.mark.parametrize("happens", ["update", "restart"])
def test_a_place_that_an_update_or_a_lost_server_overtakes_is_not_used(happens: str):
    async def overtaken() -> None:
        fleet = Fleet([Unasked()], replace(FAST, requests_per_server=1))
        (member,) = fleet.begin_update(3)
        fleet.end_update([member])
        assert await fleet.place(9, deadline=None, avoid=None, first=False) is member
        waiting = asyncio.ensure_future(fleet.place(9, deadline=None, avoid=None, first=False))
        await asyncio.sleep(0)
        fleet.free(member, 9)  # the place is the waiting request's, whose turn is yet to come
        fleet.begin_update(4) if happens == "update" else fleet.came_back("http://a")
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waiting.done(), "it would be drawn with the weights before"
        assert (member.requests, member.tokens) == (0, 0)
        fleet.end_update([member])
        assert await waiting is member
        assert (member.requests, member.tokens) == (1, 9)

    asyncio.run(overtaken())


def test_weights_that_come_while_a_server_is_asked_for_its_version_are_not_lost():
    class UpdatedMeanwhile(Unasked):
        async def weight_version(self, timeout_seconds: float = 0.0) -> str:
            (member,) = fleet.begin_update(4)
            fleet.end_update([member])
            return "4"

    async def examined() -> None:
        fleet.end_update(fleet.begin_update(3))
        fleet.failed(fleet.members[0], WrongWeights("http://a", "", 200, "tokens drawn with version 2"))
        assert not fleet.holders()
        await asyncio.gather(*fleet._helpers)
        assert fleet.holders() == fleet.members

    fleet = Fleet([UpdatedMeanwhile()], FAST)
    asyncio.run(examined())


def test_the_probe_asks_every_server_that_holds_the_weights(servers: list[FakeServer]):
    tokens = np.array([4, 2, 4, 2], dtype=np.int32)
    with engine_on(servers) as engine:
        answers = engine.probe(tokens)
        assert sorted(answers) == sorted(server.url for server in servers)
        for values in answers.values():
            assert values.tolist() == pytest.approx([token_after(tokens[:place].tolist())[1] for place in (1, 2, 3)])
        servers[0].kill()
        assert sorted(engine.probe(tokens)) == [servers[1].url]


@pytest.mark.parametrize("fails", ["transport", "pause", "resume", "attach"])
def test_a_server_that_fails_an_update_gets_no_requests_until_the_next(servers: list[FakeServer], fails: str):
    bad, good = servers
    with engine_on(servers, version=None) as engine:
        path = {"pause": "/pause", "resume": "/resume", "attach": "/init_weight_transfer_engine"}.get(fails)
        if path is None:
            courier_of(engine).broken.add(bad.url)
        else:
            bad.control_faults[path] = "oom"
        checksums = engine.load_weights(3)
        assert f"{good.url} worker 0" in checksums
        for finished in drain(engine, requests(5)):
            assert_whole(finished)
        assert not bad.requests
        courier_of(engine).broken.clear()
        bad.control_faults.clear()
        wait_until(lambda: engine.needs_weights)
        assert len(engine.load_weights(3)) == 2
        assert not engine.needs_weights
        for finished in drain(engine, requests(20)):
            assert_whole(finished)
        assert bad.requests
        assert not bad.paused
        assert not good.paused


def test_what_a_half_updated_server_was_drawing_is_drawn_elsewhere(servers: list[FakeServer]):
    bad, good = servers
    bad.token_seconds = good.token_seconds = 0.03
    with engine_on(servers) as engine:
        engine.submit(requests(6, max_tokens=30))
        wait_until(lambda: bool(bad.requests))
        courier_of(engine).broken.add(bad.url)
        engine.load_weights(4)
        wait_until(lambda: bad.running == 0)
        before = len(bad.requests)
        finished = drain(engine, [])
        assert len(finished) == 6
        for one in finished:
            assert_whole(one)
        assert len(bad.requests) == before
        assert not bad.paused


def test_an_update_that_fails_altogether_leaves_no_server_paused(servers: list[FakeServer]):
    with engine_on(servers) as engine:
        courier_of(engine).error = OSError("no room in /dev/shm")
        with pytest.raises(OSError, match="no room"):
            engine.load_weights(4)
        assert not any(server.paused for server in servers)
        courier_of(engine).error = None
        courier_of(engine).broken = {server.url for server in servers}
        assert engine.load_weights(4) == {}
        assert not any(server.paused for server in servers)
        for _ in range(3):
            assert engine.load_weights(4) == {}
        with pytest.raises(UserError, match="torn"):
            engine.load_weights(4)
        assert not any(server.paused for server in servers)


def test_a_server_started_anew_is_sent_weights_before_it_draws(servers: list[FakeServer]):
    first, second = servers
    with engine_on(servers) as engine:
        first.kill()
        for finished in drain(engine, requests(10)):
            assert_whole(finished)
        assert not engine.needs_weights, "a server that is away gets none"
        first.requests.clear()
        first.start()
        wait_until(lambda: engine.needs_weights)
        for finished in drain(engine, requests(10)):
            assert_whole(finished)
        assert not first.requests
        assert len(engine.load_weights(3)) == 2
        assert courier_of(engine).detached == [first.url]
        for finished in drain(engine, requests(10)):
            assert_whole(finished)
        assert first.requests
        assert second.requests


def test_a_server_started_anew_unnoticed_is_found_out_by_its_first_answer(servers: list[FakeServer]):
    first, _ = servers
    with engine_on(servers) as engine:
        first.version = "default"
        finished = drain(engine, requests(10))
        assert len(finished) == 10
        for one in finished:
            assert_whole(one)
        assert engine.counters()["server_retries"] >= 1
        wait_until(lambda: engine.needs_weights)


def test_generate_asks_for_weights_where_no_server_has_them():
    with FakeServer() as server, engine_on([server]) as engine:
        server.version = "default"
        with pytest.raises(WeightsNeeded):
            engine.generate([prompt(1)], sampling(), seed=1)
        engine.load_weights(3)
        assert len(engine.generate([prompt(1), prompt(2)], sampling(), seed=1)) == 2


def test_servers_of_the_run_are_watched(servers: list[FakeServer]):
    first, second = servers
    managed = FakeServers()
    with engine_on(servers, managed=managed, limits=replace(FAST, health_seconds=0.1)) as engine:
        drain(engine, requests(10))
        engine.take(0.0)
        assert managed.good == {first.url, second.url}, "an answer ends the count of restarts"
        # Restarted so fast that nobody saw it away.
        first.version = "default"
        managed.came_back = [first.url]
        first.requests.clear()
        engine.take(0.0)
        for finished in drain(engine, requests(10)):
            assert_whole(finished)
        assert not first.requests
        assert engine.needs_weights
        engine.load_weights(3)
        assert courier_of(engine).detached == [first.url]
        second.healthy = False
        engine.submit(requests(1))
        wait_until(lambda: engine.take(0.01) is not None and managed.restarts == [second.url])
        managed.happened = ["server 1 is back"]
        assert engine.notices() == ["server 1 is back"]
        assert engine.notices() == []
        managed.failure = UserError("server 0 died after 10 restarts")
        with pytest.raises(UserError, match="10 restarts"):
            engine.take(1.0)
    assert managed.closed


def test_a_router_gets_all_requests_and_servers_the_weights(servers: list[FakeServer]):
    router, server = servers
    with engine_on([server], router=router.url, version=None) as engine:
        router.version = "3"
        engine.load_weights(3)
        for finished in drain(engine, requests(10)):
            assert_whole(finished)
    assert len(router.requests) == 20
    assert not server.requests
    assert not router.control


def test_close_ends_everything_also_with_requests_under_way(servers: list[FakeServer]):
    for server in servers:
        server.token_seconds = 1.0
    before = threading.active_count()
    with engine_on(servers) as engine:
        courier = courier_of(engine)
        engine.submit(requests(5))
        wait_until(lambda: any(server.running for server in servers))
        start = time.monotonic()
        engine.close()
        engine.close()
        assert time.monotonic() - start < 2
    assert courier.closed
    wait_until(lambda: threading.active_count() <= before)
    wait_until(lambda: not any(server.running for server in servers))
