"""Rollout servers that fail in every way: each request is answered once, whole, or counted and dropped in time."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, cycle, repeat

import pytest
from engine_on_fakes import FAST, assert_whole, drain, engine_on, prompt
from fake_vllm import ANSWER_FAULTS, CUTS, REFUSALS, FakeServer, sampling

from megatron_klear.errors import UserError
from megatron_klear.rollout.engine import FinishedGroup, GroupRequest

HUNG_SECONDS = 60.0
"""What no busy machine takes for deadlines of a second or two."""
SHORT = replace(FAST, request_seconds=0.5, deadline_seconds=1.5)
FAULTS = [*ANSWER_FAULTS, *REFUSALS, *CUTS, "bad_request", "slow"]


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeServer()) for _ in range(3)]


def requests(number: int, **changes: int) -> list[GroupRequest]:
    return [GroupRequest(prompt=prompt(which), sampling=sampling(**changes), seed=5) for which in range(number)]


def assert_each_once(finished: list[FinishedGroup], asked: list[GroupRequest]) -> None:
    assert Counter(id(one.request) for one in finished) == Counter(map(id, asked))
    for one in finished:
        assert_whole(one)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_is_asked_again_elsewhere(servers: list[FakeServer], fault: str):
    bad = servers[0]
    bad.faults = repeat(fault)
    limits = replace(FAST, request_seconds=0.4 if fault == "hang" else 5.0)
    with engine_on(servers, limits=limits) as engine:
        asked = requests(8)
        assert_each_once(drain(engine, asked), asked)
        assert bad.requests
        assert (engine.counters()["server_retries"] > 0) == (fault != "slow")
        assert engine.counters() == {"server_retries": 0.0, "groups_dropped": 0.0}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_single_server_is_asked_again_after_a_while(fault: str):
    with FakeServer() as server:
        server.faults = chain([fault, "", fault], repeat(""))
        with engine_on([server], limits=replace(FAST, request_seconds=0.4 if fault == "hang" else 5.0)) as engine:
            asked = requests(4)
            engine.submit(asked)
            finished: list[FinishedGroup] = []
            while engine.in_flight:
                finished += engine.take(0.1)
                if engine.needs_weights:
                    engine.load_weights(3)
            assert_each_once(finished, asked)


def test_partial_answers_are_continued_and_keep_their_versions(servers: list[FakeServer]):
    for server in servers:
        server.faults = chain(["abort"] * 6, repeat(""))
    with engine_on(servers) as engine:
        asked = requests(10, max_tokens=40)
        assert_each_once(drain(engine, asked), asked)
        assert engine.counters()["server_retries"] >= 6
    lengths = [len(request["token_ids"]) for server in servers for request in server.requests]
    assert max(lengths) > 3, "what was drawn is not drawn again"


def test_a_request_that_still_gets_tokens_is_not_cut():
    # Each response takes several times request_seconds and deadline_seconds.
    with FakeServer(token_seconds=0.05) as server:
        limits = replace(FAST, request_seconds=0.3, deadline_seconds=0.4)
        with engine_on([server], limits=limits) as engine:
            asked = requests(3, max_tokens=40)
            assert_each_once(drain(engine, asked), asked)
            assert engine.counters() == {"server_retries": 0.0, "groups_dropped": 0.0}
            assert not server.aborted
            assert engine._fleet.members[0].failures == 0, "no strike either"


def test_a_server_without_statistics_is_asked_for_what_it_has_and_goes_on_from_there():
    with FakeServer(token_seconds=0.05) as server:
        server.has_metrics = False
        with engine_on([server], limits=replace(FAST, request_seconds=0.7, deadline_seconds=1.5)) as engine:
            asked = requests(2, max_tokens=40)
            assert_each_once(drain(engine, asked), asked)
            assert server.aborted
            assert engine.counters()["groups_dropped"] == 0
            assert max(len(request["token_ids"]) for request in server.requests) > 3, "what was drawn is kept"


def test_what_a_server_drew_before_it_got_stuck_is_kept(servers: list[FakeServer]):
    stuck = servers[0]
    stuck.faults = repeat("stuck")
    with engine_on(servers, limits=replace(FAST, request_seconds=0.3)) as engine:
        asked = requests(8, max_tokens=40)
        assert_each_once(drain(engine, asked), asked)
        assert stuck.requests
        assert len(stuck.aborted) >= len(stuck.requests)
        assert engine._fleet.members[0].failures > 0, "a server that makes no progress has a strike"
        continued = [request for server in servers for request in server.requests if len(request["token_ids"]) > 3]
        assert continued


def test_a_pause_for_new_weights_is_no_lack_of_progress():
    with (
        FakeServer(token_seconds=0.01) as server,
        engine_on([server], limits=replace(FAST, request_seconds=0.3)) as engine,
    ):
        asked = requests(2, max_tokens=40)
        engine.submit(asked)
        wait_for(lambda: bool(server.running))
        transport = engine._courier
        send = transport.send
        transport.send = lambda *arguments: (time.sleep(0.6), send(*arguments))[1]
        engine.load_weights(4)
        assert_each_once(drain(engine, []), asked)
        assert not server.aborted


def test_a_server_is_given_what_its_cache_holds(servers: list[FakeServer]):
    small, large, silent = servers
    small.cache_tokens, large.cache_tokens = (
        30,
        120,
    )  # a request is expected to take 3 + 12 / 2 tokens, and up to 3 + 12
    for server in servers:
        server.token_seconds = 0.02
    with engine_on(servers) as engine:
        asked = requests(30)
        assert_each_once(drain(engine, asked), asked)
        assert 1 <= small.most_running <= 3
        assert 4 <= large.most_running <= 13
        assert silent.most_running == 16
    with engine_on([small]) as engine:
        asked = requests(2, max_tokens=40)
        assert_each_once(drain(engine, asked), asked)
        assert small.most_running <= 3, "one that is larger than the cache is drawn alone"


def test_a_part_drawn_before_an_update_is_told_apart_from_the_rest():
    with FakeServer() as server:
        server.faults = chain(["abort"], repeat("hang"))
        with engine_on([server], limits=replace(FAST, request_seconds=0.5)) as engine:
            asked = requests(1, count=1, max_tokens=40)
            engine.submit(asked)
            wait_for(lambda: len(server.requests) > 1)
            server.faults = iter(())
            engine.load_weights(4)
            (finished,) = drain(engine, [])
            assert_whole(finished)
            assert finished.group is not None
            assert [span.version for span in finished.group.samples[0].version_spans] == [3, 4]


@pytest.mark.parametrize("fault", ["not_json", "started_anew", "older", "oom", "drop", "hang", "bad_request"])
def test_what_fails_for_ever_is_dropped_within_the_deadline(fault: str):
    with FakeServer() as server:
        server.faults = repeat(fault)
        with engine_on([server], limits=SHORT) as engine:
            start = time.monotonic()
            asked = requests(3)
            finished = drain(engine, asked)
            assert time.monotonic() - start < HUNG_SECONDS
            assert Counter(id(one.request) for one in finished) == Counter(map(id, asked))
            for one in finished:
                assert one.group is None
                assert one.request.prompt.id in one.failure
            assert engine.counters()["groups_dropped"] == 3


def test_generate_leaves_out_a_dropped_group_and_stops_where_too_many_are():
    limits = replace(FAST, max_unsound=1)
    prompts = [prompt(number) for number in range(10)]
    with FakeServer() as server:
        server.faults = chain(["bad_request"] * 3, repeat(""))
        with engine_on([server], limits=limits, max_dropped_share=0.5) as engine:
            groups = engine.generate(prompts, sampling(), seed=1)
            dropped = int(engine.counters()["groups_dropped"])
            assert 1 <= dropped <= 3
            assert len(groups) == 10 - dropped
        server.faults = repeat("bad_request")
        with (
            engine_on([server], limits=limits, max_dropped_share=0.5) as engine,
            pytest.raises(UserError, match=r"10 of 10 groups were dropped.*max_tokens is too large"),
        ):
            engine.generate(prompts, sampling(), seed=1)


@pytest.mark.parametrize("use", ["take", "generate", "load_weights"])
def test_when_all_servers_are_dead_the_run_ends_within_the_deadline(servers: list[FakeServer], use: str):
    uses = {
        "take": lambda: [drain(engine, requests(2)) for _ in range(100)],
        "generate": lambda: engine.generate([prompt(1)], sampling(), seed=1),
        "load_weights": lambda: engine.load_weights(4),
    }
    with engine_on(servers, limits=SHORT) as engine:
        for server in servers:
            server.kill()
        start = time.monotonic()
        with pytest.raises(UserError, match=r"no rollout server|were dropped"):
            uses[use]()
        assert time.monotonic() - start < HUNG_SECONDS


def test_a_hung_server_is_given_up_and_comes_back(servers: list[FakeServer]):
    hung = servers[0]
    hung.faults = repeat("hang")
    limits = replace(FAST, request_seconds=60.0, deadline_seconds=60.0, health_seconds=0.1)
    with engine_on(servers, limits=limits) as engine:
        asked = requests(12)
        engine.submit(asked)
        wait_for(lambda: bool(hung.requests))
        hung.healthy = False
        start = time.monotonic()
        assert_each_once(drain(engine, []), asked)
        assert time.monotonic() - start < 5, "long before the request's own timeout"
        hung.healthy, hung.faults = True, iter(())
        # Its weights are the same still: it needs no new ones.
        wait_for(lambda: engine._fleet.members[0].alive)
        hung.requests.clear()
        asked = requests(20)
        assert_each_once(drain(engine, asked), asked)
        assert hung.requests
        assert not engine.needs_weights


def test_a_server_killed_in_the_middle_of_an_update_costs_only_itself(servers: list[FakeServer]):
    victim = servers[0]
    with engine_on(servers) as engine:
        asked = requests(10)
        engine.submit(asked)
        victim.control_faults["/start_weight_update"] = "hang"
        killer = threading.Timer(0.2, victim.kill)
        killer.start()
        assert len(engine.load_weights(4)) == 2
        killer.join()
        assert_each_once(drain(engine, []), asked)
        assert not any(server.paused for server in servers[1:])


@pytest.mark.parametrize("seed", range(6))
def test_under_random_faults_nothing_is_lost_doubled_or_wrong(seed: int):
    # Servers fail at random in every way, are killed, started anew and updated, all at once.
    chance = random.Random(seed)
    pool = [*ANSWER_FAULTS, *REFUSALS, *CUTS, "abort", "abort", "slow"]
    with ExitStack() as stack:
        servers = [stack.enter_context(FakeServer(token_seconds=0.002)) for _ in range(chance.randint(2, 4))]
        for server in servers:
            faults = [chance.choice(pool) if chance.random() < 0.3 else "" for _ in range(50)]
            server.faults = cycle(faults)
        limits = replace(FAST, request_seconds=0.5, deadline_seconds=30.0)
        with engine_on(servers, limits=limits, version=1) as engine:
            asked = requests(40, max_tokens=chance.choice([5, 20]))
            engine.submit(asked[:25])
            finished: list[FinishedGroup] = []
            version = 1
            down: list[FakeServer] = []
            waiting = asked[25:]
            until = time.monotonic() + 40
            while engine.in_flight or waiting:
                assert time.monotonic() < until
                engine.submit([waiting.pop() for _ in range(min(3, len(waiting)))])
                finished += engine.take(0.05)
                deed = chance.random()
                if down and deed < 0.5:
                    down.pop().start()
                elif deed < 0.15 and len(servers) - len(down) > 1:
                    down.append(chance.choice([server for server in servers if server not in down]))
                    down[-1].kill()
                elif deed < 0.3 or engine.needs_weights:
                    version += deed < 0.3
                    engine.load_weights(version)
            assert_each_once(finished, asked)
            for one in finished:
                assert one.group is not None
                for sample in one.group.samples:
                    versions = [span.version for span in sample.version_spans] or [sample.policy_version]
                    assert versions == sorted(versions)
                    assert 1 <= versions[0] <= versions[-1] <= version
            assert engine.counters()["server_retries"] > 0
            assert not any(server.paused for server in servers if server not in down)


def wait_for(condition, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.01)
