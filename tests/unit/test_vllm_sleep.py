"""Servers that share the trainer's cards: asleep while it trains, awake whole or not at all."""

import pytest
from engine_on_fakes import (
    FakeServers,
    assert_whole,
    courier_of,
    drain,
    engine_on,
    prompt,
    requests,
    wait_until,
)
from fake_vllm import FakeServer, sampling

from megatron_klear.errors import UserError
from megatron_klear.rollout.vllm.engine import VLLMEngine


def test_sleep_is_for_servers_on_the_trainers_cards(servers: list[FakeServer]):
    with engine_on(servers) as engine:
        engine.sleep()
        assert not any("/sleep" in path for server in servers for path in server.control)
        courier_of(engine).needs_shared_device = True
        for server in servers:
            server.control.clear()
        engine.sleep()
        assert not engine.needs_weights
        engine.load_weights(4)
        for server in servers:
            assert server.control == [
                *("/sleep 2", "/wake_up weights", "/pause keep", "/start_weight_update", "/finish_weight_update"),
                *("/wake_up kv_cache", "/resume"),
            ]
        assert len(engine.generate([prompt(1)], sampling(), seed=1)) == 1


def test_no_server_of_the_run_is_awake_beside_sleeping_ones(servers: list[FakeServer]):
    managed = FakeServers()
    with engine_on(servers, managed=managed) as engine:
        courier_of(engine).needs_shared_device = True
        sound, broken = servers
        broken.control_faults = {"/sleep": "oom"}
        managed.looks_until_up = 2
        engine.sleep()
        assert managed.looks_until_up < 0, "one that starts was not waited for"
        assert managed.restarts == [broken.url], "one that did not sleep goes on with its memory"
        assert "/sleep 2" in sound.control
        assert managed.held == [True], "one that dies asleep would start beside the trainer"
        engine.load_weights(4)
        assert managed.held == [True, False]
        managed.failure = UserError("server 0 died after 10 restarts")
        managed.looks_until_up = 10
        with pytest.raises(UserError, match="10 restarts"):
            engine.sleep()


def on_shared_cards(engine: VLLMEngine) -> VLLMEngine:
    courier_of(engine).needs_shared_device = True
    engine.sleep()
    return engine


@pytest.mark.parametrize("part", ["weights", "kv_cache"])
def test_a_server_that_does_not_wake_whole_draws_nothing_until_it_does(servers: list[FakeServer], part: str):
    sound, broken = servers
    managed = FakeServers()
    with engine_on(servers, managed=managed) as engine:
        on_shared_cards(engine)
        broken.control_faults = {f"/wake_up {part}": "oom"}
        engine.load_weights(4)
        assert managed.restarts == [broken.url], "what fails to wake is started anew"
        for _ in range(2):
            wait_until(lambda: engine.needs_weights)
            for finished in drain(engine, requests(10)):
                assert_whole(finished)
            assert not broken.requests
            engine.load_weights(4)
        broken.control_faults = {}
        wait_until(lambda: engine.needs_weights)
        engine.load_weights(4)
        assert not broken.asleep
        for finished in drain(engine, requests(20)):
            assert_whole(finished)
        assert broken.requests
        assert not sound.drawn_asleep
        assert not broken.drawn_asleep


def test_servers_that_take_weights_and_do_not_wake_end_the_run(servers: list[FakeServer]):
    with engine_on(servers) as engine:
        on_shared_cards(engine)
        for server in servers:
            server.control_faults = {"/wake_up kv_cache": "oom"}
        for _ in range(4):
            engine.load_weights(4)
            assert not engine._fleet.can_draw
        with pytest.raises(UserError, match=r"sync 4.*asleep"):
            engine.load_weights(4)
        assert not any(server.requests for server in servers)


def test_a_half_woken_fleet_sleeps_and_wakes_whole(servers: list[FakeServer]):
    _, broken = servers
    with engine_on(servers, managed=FakeServers()) as engine:
        on_shared_cards(engine)
        broken.control_faults = {"/wake_up kv_cache": "oom"}
        engine.load_weights(4)
        broken.control_faults = {}
        engine.sleep()
        assert [sorted(server.asleep) for server in servers] == [["kv_cache", "weights"]] * 2
        wait_until(lambda: all(member.alive for member in engine._fleet.members))
        engine.load_weights(5)
        assert not any(server.asleep for server in servers)
        for finished in drain(engine, requests(20)):
            assert_whole(finished)
        assert broken.requests
