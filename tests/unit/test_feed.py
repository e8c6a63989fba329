"""Feeds against rollouts that come late, out of order and across versions: what a step gets, and no prompt twice."""

import copy
import json
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from fake_rollouts import FakeGrader, FakeRollouts
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_groups import fixed_groups, gppo_config, with_routes

from megatron_klear.config.rl import PromptSource
from megatron_klear.data.prompts import PromptStream
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.data.tokenizer import load_tokenizer
from megatron_klear.errors import UserError
from megatron_klear.orchestrator.feed import DrawSettings
from megatron_klear.orchestrator.overlap import open_feed
from megatron_klear.orchestrator.sampler import Sampler
from megatron_klear.rl.versions import oldest_version
from megatron_klear.runs.group_file import dump_groups, load_groups
from megatron_klear.runs.log import RunLog
from megatron_klear.types import ProgramResult, Sample, Score, Verdict

MODES = ("synchronous", "one_step_off", "asynchronous")
STEPS, PER_STEP, PROMPTS = 8, 3, 10


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> PromptStream:
    folder = write_tiny_model(tmp_path_factory.mktemp("feed") / "model", "qwen3", TinyShape(), weights=False)
    source = PromptSource(generator="arithmetic", settings={"seed": 1}, count=PROMPTS)
    return PromptStream([source], load_tokenizer(folder), max_tokens=64, seed=3)


@dataclass
class Run:
    """The loop without a trainer: syncs, steps, updates, checkpoints; it can be killed and started again."""

    prompts: PromptStream
    mode: str
    seed: int
    algorithm: dict = field(default_factory=dict)
    rollout: dict = field(default_factory=dict)
    rollouts: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = gppo_config(
            Path("model"),
            {
                "algorithm": {"prompts_per_step": PER_STEP, "prompts_per_update": 1} | self.algorithm,
                "rollout": {"kind": "vllm", "mode": self.mode, "max_dropped_share": 1.0} | self.rollout,
                "train": {"steps": STEPS},
            },
        )
        self.saved: tuple[int, str, dict[str, bytes], int] | None = None
        self.steps: list = []  # (number, what the step got, what failed)
        self.generation = 0
        self.open()

    def open(self) -> None:
        """Start, or start again from what was saved."""
        self.generation += 1
        self.engine = FakeRollouts(self.seed + 1000 * self.generation, **self.rollouts)
        self.sampler = Sampler(self.engine, self.engine.load, max_dropped_share=1.0)
        self.failed: list[str] = []
        self.sampler.check_dropped = lambda failures, total: self.failed.extend(failures)
        self.stream = copy.deepcopy(self.prompts)
        self.feed = open_feed(DrawSettings.by(self.config), self.sampler, self.stream, FakeGrader(self.seed), RunLog())
        self.number = 0
        self.steps = self.steps[:0]
        if self.saved is not None:
            self.number, state, files, kept = self.saved
            self.steps = self.kept[:kept]
            self.feed.load_state_dict(json.loads(state), files)

    def step(self, *, die_before_save: bool = False) -> None:
        """One rollout step; killed before its checkpoint, the run starts again from the one before."""
        self.sampler.sync(self.number)
        got = self.feed.next_step(self.number)
        failed, self.failed = self.failed, []
        self.steps.append((self.number, got, failed))
        for _ in got.chosen:
            self.feed.work()
        self.number += 1
        if die_before_save:
            self.open()
            return
        self.kept = list(self.steps)
        self.saved = (self.number, json.dumps(self.feed.state_dict()), self.feed.files(), len(self.steps))

    def whole(self) -> "Run":
        while self.number < STEPS:
            self.step()
        return self


def used(run: Run) -> Counter:
    """Prompts that were trained on or reported as dropped, and those still in the book."""
    ids = [group.prompt.id for _, got, _ in run.steps for group in got.graded]
    ids += [prompt_id for _, _, failed in run.steps for prompt_id in failed]
    state = run.feed.state_dict()
    ids += [request["prompt"] for request in state["requests"]] + state["prompts"]["again"] + state.get("failures", [])
    return Counter(prompt_id.partition("~")[0] for prompt_id in ids)


def handed_out(run: Run) -> Counter:
    """What the stream has given up to its position."""
    taken = sum(run.stream.state_dict()["taken"])
    return Counter(prompt.id for prompt in copy.deepcopy(run.prompts).take(taken))


def check(run: Run) -> None:
    """Each prompt of the stream up to its position once, each step's groups as it may have them."""
    assert used(run) == handed_out(run)
    assert [number for number, _, _ in run.steps] == list(range(STEPS))
    bound = {"synchronous": 0, "one_step_off": 1, "asynchronous": run.rollout.get("max_staleness", 1)}[run.mode]
    for number, got, _ in run.steps:
        assert len(got.chosen) <= PER_STEP
        assert all(any(group is one for one in got.graded) for group in got.chosen)
        assert all(len(set(group.rewards)) > 1 for group in got.chosen)
        assert all(number - bound <= oldest_version(group) <= number for group in got.chosen)
        assert got.num_informative == sum(len(set(group.rewards)) > 1 for group in got.graded)
        assert len(got.chosen) == min(PER_STEP, got.num_informative)


shares = st.sampled_from([0.0, 0.2])
runs = {
    "mode": st.sampled_from(MODES),
    "seed": st.integers(0, 10**6),
    "rounds": st.integers(1, 3),
    "generated": st.sampled_from([None, 5, 12]),
    "staleness": st.integers(1, 3),
    "most": st.sampled_from([None, 1, 4]),
    "fail": shares,
    "lose_weights": shares,
}


def made(prompts, mode, seed, rounds, generated, staleness, most, fail, lose_weights) -> Run:
    return Run(
        prompts,
        mode,
        seed,
        {"max_generation_rounds": rounds, "generated_prompts": generated},
        {"max_staleness": staleness, "max_groups_in_flight": most},
        {"fail": fail, "lose_weights": lose_weights},
    )


@settings(max_examples=30, deadline=None)
@given(**runs)
def test_every_prompt_is_used_once(prompts, **settings):
    run = made(prompts, **settings).whole()
    check(run)
    if settings["mode"] == "asynchronous":
        assert run.engine.most_in_flight <= min((settings["staleness"] + 1) * PER_STEP, settings["most"] or 10**6)


@settings(max_examples=30, deadline=None)
@given(kills=st.lists(st.integers(0, STEPS - 1), max_size=6), **runs)
def test_every_prompt_is_used_once_whenever_the_run_is_killed(prompts, kills, **settings):
    run = made(prompts, **settings)
    left = Counter(kills)
    while run.number < STEPS:
        die = left[run.number] > 0
        left[run.number] -= die
        run.step(die_before_save=die)
    check(run)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), staleness=st.integers(1, 3), rounds=st.integers(1, 3))
def test_no_group_grows_too_old_when_all_can_be_had(prompts, seed, staleness, rounds):
    run = made(prompts, "asynchronous", seed, rounds, None, staleness, None, 0.0, 0.0).whole()
    assert sum(got.counters["stale_groups"] for _, got, _ in run.steps) == 0


@pytest.mark.parametrize("mode", MODES[1:])
def test_drawn_groups_survive_a_kill_as_they_are(prompts, mode: str):
    run = Run(prompts, mode, 5, rollouts={"slow": 0.7})
    drawn, state = [], {"requests": []}
    while not 0 < len(drawn) < len(state["requests"]):
        run.step()
        state = json.loads(run.saved[1])
        drawn = [request for request in state["requests"] if request["drawn"]]
    asked = {request["id"] + str(request["seed"]) for request in state["requests"] if not request["drawn"]}
    kept = {request["id"] + str(request["seed"]) for request in drawn}
    before = {entry.request.prompt.id: entry.group for entry in run.feed._entries if entry.group is not None}
    run.open()
    after = {entry.request.prompt.id: entry.group for entry in run.feed._entries if entry.group is not None}
    assert before.keys() == after.keys()
    for name, group in before.items():
        assert after[name].texts == group.texts
        for ours, theirs in zip(after[name].samples, group.samples, strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.logprobs.tobytes() == theirs.logprobs.tobytes()
            assert ours.version_spans == theirs.version_spans
    run.step()
    submitted = {prompt_id + str(seed) for prompt_id, seed in run.engine.submitted}
    assert asked <= submitted
    assert not kept & submitted


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
def test_a_run_goes_on_in_another_mode(prompts, before: str, after: str):
    run = Run(prompts, before, 7)
    for _ in range(4):
        run.step()
    in_book = len(json.loads(run.saved[1])["requests"])
    assert (in_book > 0) == (before != "synchronous")
    run.mode, run.kept = after, list(run.steps)
    reported = used(run)
    run.config = Run(prompts, after, 7).config
    run.open()
    assert handed_out(run) == reported
    run.whole()
    assert used(run) == handed_out(run)


def test_a_group_of_too_old_a_policy_is_dropped_and_its_prompt_drawn_again(prompts):
    run = Run(prompts, "asynchronous", 1, {"max_generation_rounds": 3}, rollouts={"slow": 0.0})
    run.step()
    run.step()
    asked = set(run.engine.submitted)
    aged = [entry for entry in run.feed._entries if entry.is_graded or entry.group is not None]
    run.number += 3  # as if steps had been taken without it
    run.step()
    got = run.steps[-1][1]
    assert got.counters["stale_groups"] >= len([e for e in aged if e.is_graded]) > 0
    again = {prompt_id for prompt_id, _ in set(run.engine.submitted) - asked}
    assert {entry.prompt.id for entry in aged} <= again | {g.prompt.id for g in got.graded}
    assert all(oldest_version(group) >= 4 for group in got.chosen)


def test_servers_that_come_back_get_the_weights(prompts):
    for mode in MODES:
        run = Run(prompts, mode, 2, rollouts={"lose_weights": 0.3}).whole()
        assert run.engine.syncs > STEPS
        check(run)


def test_one_step_off_asks_for_what_synchronous_does(prompts):
    asked = {mode: Run(prompts, mode, 4, rollouts={"slow": 0.0}).whole().engine.submitted for mode in MODES[:2]}
    assert Counter(asked["synchronous"]) == Counter(asked["one_step_off"])


class Silent(FakeRollouts):
    """Servers that never answer."""

    def take(self, timeout_seconds):
        return []


class Forgetful(FakeRollouts):
    """Requests that never end, and are not under way either."""

    def submit(self, requests):
        pass


class Gone(FakeRollouts):
    """No server is left."""

    def take(self, timeout_seconds):
        raise UserError("no server is left")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "words"), [(Silent, "groups under way"), (Gone, "no server is left"), (Forgetful, "never come")]
)
def test_servers_that_never_answer_end_the_run(prompts, mode: str, kind, words: str):
    run = Run(prompts, mode, 0)
    engine = kind(0)
    sampler = Sampler(engine, engine.load, patience_seconds=0.05)
    feed = open_feed(DrawSettings.by(run.config), sampler, run.stream, FakeGrader(0), RunLog())
    sampler.sync(0)
    with pytest.raises(UserError, match=words):
        feed.next_step(0)


class Slow(FakeRollouts):
    """Delivers nothing for a while, in which its responses grow."""

    until = 0.0

    def take(self, timeout_seconds):
        self.last_progress = time.monotonic()
        self.until = self.until or self.last_progress + 0.2
        return super().take(timeout_seconds) if self.last_progress > self.until else []


@pytest.mark.parametrize("mode", MODES)
def test_patience_is_with_responses_that_grow(prompts, mode: str):
    run = Run(prompts, mode, 0)
    engine = Slow(0)
    sampler = Sampler(engine, engine.load, patience_seconds=0.05)
    feed = open_feed(DrawSettings.by(run.config), sampler, run.stream, FakeGrader(0), RunLog())
    sampler.sync(0)
    assert feed.next_step(0).graded


def test_what_happens_to_servers_is_told(prompts):
    run = Run(prompts, "synchronous", 0)
    told: list[str] = []
    sampler = Sampler(run.engine, run.engine.load, tell=told.append)
    feed = open_feed(DrawSettings.by(run.config), sampler, run.stream, FakeGrader(0), RunLog())
    sampler.sync(0)
    run.engine.happened = ["server 1 ended with exit code 9; restart 1"]
    feed.next_step(0)
    assert told == ["rollout server 1 ended with exit code 9; restart 1"]


class Forgetting(FakeRollouts):
    """Takes the weights again and again, and answers nothing."""

    def take(self, timeout_seconds):
        self.needs_weights = True
        return []


@pytest.mark.parametrize("mode", MODES)
def test_servers_that_take_weights_and_answer_nothing_end_the_run(prompts, mode: str):
    run = Run(prompts, mode, 0)
    engine = Forgetting(0)

    def send(version: int) -> None:
        engine.load(version)
        assert engine.syncs < 100_000, "the limit of patience is never reached"

    sampler = Sampler(engine, send, patience_seconds=0.05)
    feed = open_feed(DrawSettings.by(run.config), sampler, run.stream, FakeGrader(0), RunLog())
    sampler.sync(0)
    with pytest.raises(UserError, match="groups under way"):
        feed.next_step(0)
    assert engine.syncs > 1


@pytest.mark.parametrize("mode", MODES)
def test_too_many_dropped_groups_end_the_run(prompts, mode: str):
    run = Run(prompts, mode, 0, rollouts={"fail": 1.0})
    sampler = Sampler(run.engine, run.engine.load, max_dropped_share=0.5)
    feed = open_feed(DrawSettings.by(run.config), sampler, run.stream, FakeGrader(0), RunLog())
    sampler.sync(0)
    with pytest.raises(UserError, match=r"(3 of 3|6 of 6) groups could not be drawn.*max_dropped_share 0.5"):
        feed.next_step(0)


def test_validation_takes_nothing_from_what_is_under_way(prompts):
    run = Run(prompts, "asynchronous", 9, rollouts={"slow": 0.0})
    for _ in range(STEPS):
        run.step()
        if run.number < STEPS:
            groups = run.sampler.draw(run.prompts.all, run.config.sampling, seed=1)
            assert [group.prompt.id for group in groups] == [prompt.id for prompt in run.prompts.all]
    check(run)


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("mode", ["one_step_off", "asynchronous"])
def test_a_run_goes_on_with_the_other_setting_of_replay(prompts, mode: str, replayed: bool):
    """What was drawn ahead without routes is drawn again; routes that are not wanted any more are left out."""
    run = Run(prompts, mode, 3, {"router_replay": "none" if replayed else "sampler"}, rollouts={"routes": not replayed})
    while not run.feed.files():
        run.step()
    told = {"router_replay": "sampler" if replayed else "none"}
    run.config = run.config.model_copy(update={"algorithm": run.config.algorithm.model_copy(update=told)})
    run.rollouts, before = {"routes": replayed}, run.number
    run.open()
    check(run.whole())
    later = [sample for _, got, _ in run.steps[before:] for group in got.graded for sample in group.samples]
    assert {sample.routes is not None for sample in later} == {replayed}


def test_groups_come_back_from_bytes_as_they_were():
    groups = fixed_groups(3, 4)
    groups[1].samples[2] = Sample(tokens=np.array([1, 2], np.int32), trained=np.array([False, True]))
    groups[1].samples[1:4:2] = [with_routes(sample, 300) for sample in groups[1].samples[1:4:2]]
    ran = Score(reward=0.5, verdict=Verdict.WRONG, note="a", program=ProgramResult("failed", 1, 2))
    groups[0] = replace(groups[0], scores=[ran] * len(groups[0].samples))
    groups[2] = copy.replace(groups[2], scores=None) if hasattr(copy, "replace") else groups[2]
    known = {group.prompt.id: group.prompt for group in groups}
    for ours, theirs in zip(load_groups(dump_groups(groups), known.__getitem__), groups, strict=True):
        assert (ours.prompt, ours.texts, ours.scores) == (theirs.prompt, theirs.texts, theirs.scores)
        for a, b in zip(ours.samples, theirs.samples, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.trained.tolist() == b.trained.tolist()
            assert (a.logprobs is None) == (b.logprobs is None)
            assert a.logprobs is None or a.logprobs.tobytes() == b.logprobs.tobytes()
            assert (a.policy_version, a.version_spans, a.finish) == (b.policy_version, b.version_spans, b.finish)
            assert (a.routes is None) == (b.routes is None)
            assert a.routes is None or (a.routes.dtype == b.routes.dtype and (a.routes == b.routes).all())
    assert load_groups(dump_groups([]), known.__getitem__) == []
