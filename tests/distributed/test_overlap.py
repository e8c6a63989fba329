"""Whole runs whose rollouts are drawn in the background, by the trainer itself in place of servers."""

import json
from functools import partial
from pathlib import Path

import pytest
from forked_orchestrator import spawning
from tiny_rl_run import start, train, write_run

from megatron_klear.config.rollout import LocalRolloutConfig
from megatron_klear.errors import UserError
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.rollout.engine import FinishedGroup
from megatron_klear.runs.rollout_files import read_samples, rollout_files

TIMINGS = {"step_seconds", "tokens_per_second", "sync_seconds", "server_retries"}


class Background:
    """In the orchestrator: has the trainer draw two groups at a call, the last asked for first."""

    fault = ""
    last_progress = 0.0

    def __init__(self, drawn_by_trainer) -> None:
        self._engine = drawn_by_trainer
        self._waiting, self._taken, self._version = [], 0, -1
        self.needs_weights = False

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def load_weights(self, version):
        # One that comes back as a version is sent gets none of it, and the step waits for groups at that moment.
        self.needs_weights = self.fault == "restarted" and version != self._version
        self._version = version
        return self._engine.load_weights(version)

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    def notices(self) -> list[str]:
        return []

    def submit(self, requests) -> None:
        self._waiting += requests

    def take(self, timeout_seconds: float) -> list[FinishedGroup]:
        finished = []
        while self._waiting and len(finished) < 2:
            self._taken += 1
            if self.fault == "gone" and self._taken > 10:
                raise UserError("no server is left")
            request = self._waiting.pop()
            groups = self._engine.generate([request.prompt], request.sampling, request.seed)
            dropped = self.fault == "dropped" and self._taken % 9 == 0
            finished.append(FinishedGroup(request=request, group=None if dropped else groups[0], failure="too late"))
        return finished


def in_the_orchestrator(fault: str) -> None:
    """Draw in the background, and only while the trainer waits, for it is the one that draws."""
    from megatron_klear.orchestrator.orchestrator import Orchestrator

    open_engine = Orchestrator._open_engine

    def open_background(self):
        vllm = self._config
        self._config = vllm.model_copy(update={"rollout": LocalRolloutConfig()})
        try:
            return Background(open_engine(self)[0]), None
        finally:
            self._config = vllm

    Background.fault = fault
    Orchestrator._open_engine = open_background
    Orchestrator.draws_ahead = False


def overlapped(toml: Path, output: Path, processes: int, mode: str, fault: str, *flags: str) -> int:
    """Train in the mode; how often this rank gave its weights."""
    from megatron_klear.train import rl_run, rollouts
    from megatron_klear.train.weight_sync import OwnSampler

    loads = []

    class Counting(OwnSampler):
        def load(self, version: int) -> None:
            loads.append(version)
            super().load(version)

    def open_counting(engine, config, stop_token_ids):
        local = config.model_copy(update={"rollout": LocalRolloutConfig()})
        opened = open_trainer(engine, local, stop_token_ids)
        return Counting(engine, opened._sampler)

    open_trainer, rl_run.open_trainer = rl_run.open_trainer, open_counting
    rollouts.spawn = spawning(partial(in_the_orchestrator, fault))
    # Servers that are named are not started; nothing ever calls on this one.
    servers = ("--rollout.kind", "vllm", "--rollout.servers", "http://127.0.0.1:9")
    chosen = (*servers, "--rollout.mode", mode, "--rollout.max_dropped_share", "0.3")
    train(start(toml, "--output", str(output), *chosen, *flags, processes=processes))
    return len(loads)


def plain(toml: Path, output: Path, processes: int, *flags: str) -> None:
    train(start(toml, "--output", str(output), *flags, processes=processes))


def records(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS and not k.startswith("seconds/")} for line in lines]


def reported(output: Path) -> list[str]:
    """Prompts of all groups that steps reported, in order, each group once."""
    samples = [sample for path in rollout_files(output / "rollouts") for sample in read_samples(path)[1]]
    return [sample["prompt_id"].partition("~")[0] for sample in samples[::3]]


def newest(output: Path) -> tuple[Path, dict]:
    checkpoint = manifest.step_folder(output / "checkpoints", manifest.steps(output / "checkpoints")[-1])
    return checkpoint, manifest.read_training(checkpoint)["extra"]


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("overlap"))


def test_synchronous_in_the_background_is_the_local_engine_s_run(toml, tmp_path, ranks):
    """The same tokens; numbers up to the rounding of a batch of one prompt against one of many."""
    ranks(2, plain, toml, tmp_path / "local", 2)
    ranks(2, overlapped, toml, tmp_path / "background", 2, "synchronous", "")
    for found, expected in zip(records(tmp_path / "background"), records(tmp_path / "local"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    files = [rollout_files(tmp_path / name / "rollouts") for name in ("local", "background")]
    samples = [[sample for path in these for sample in read_samples(path)[1]] for these in files]
    for ours, theirs in zip(*samples, strict=True):
        for key in ("prompt_id", "token_ids", "reward", "finish", "weight_version"):
            assert ours[key] == theirs[key]


@pytest.mark.parametrize(("mode", "layout"), [("one_step_off", "TP2"), ("asynchronous", "DP2")])
def test_overlapping_runs_train_on_what_older_policies_drew(toml, tmp_path, ranks, mode: str, layout: str):
    flags = ("--parallel.tensor", "2") if layout == "TP2" else ()
    ranks(2, overlapped, toml, tmp_path / "run", 2, mode, "", *flags)
    steps = records(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert all(step["weight_version_lag_max"] <= 1 for step in steps)
    assert steps[0]["weight_version_lag_max"] == 0
    assert any(step["weight_version_lag_mean"] > 0 for step in steps)
    assert sum(step["updates"] for step in steps) >= 5
    older = [step["mismatch_max"] > 1e-3 for step in steps if step["weight_version_lag_max"] and step["updates"]]
    assert all(older), "log-probs of older weights are not the trainer's"
    assert steps[0]["mismatch_max"] < 1e-3


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_server_that_comes_back_is_given_the_weights_by_all_ranks(toml, tmp_path, ranks, mode: str):
    loads = ranks(2, overlapped, toml, tmp_path / "run", 2, mode, "restarted")
    assert loads[0] == loads[1] > 7  # before the first step, at each of five, and after the last
    assert len(records(tmp_path / "run")) == 5


def test_dropped_groups_are_counted(toml, tmp_path, ranks):
    ranks(1, overlapped, toml, tmp_path / "run", 1, "asynchronous", "dropped")
    assert sum(step["groups_dropped"] for step in records(tmp_path / "run")) >= 2


def test_no_server_left_ends_the_run_on_every_rank(toml, tmp_path, ranks):
    with pytest.raises(UserError, match="no server is left") as info:
        ranks(2, overlapped, toml, tmp_path / "run", 2, "asynchronous", "gone")
    assert "rank 1 raised" in "".join(info.value.__notes__)


def test_groups_under_way_are_in_the_checkpoint_and_used_after_it(toml, tmp_path, ranks):
    """Two steps of four in a short run, then the rest: every prompt once, and nothing that was drawn is lost."""
    output = tmp_path / "run"
    more = ("--rollout.max_staleness", "2", "--algorithm.max_generation_rounds", "1")
    ranks(2, stopped_after, toml, output, 2, *more)
    checkpoint, extra = newest(output)
    assert extra["rollout_step"] == 2
    assert extra["files"] == ["rollouts.npz"]
    drawn = [request["prompt"] for request in extra["feed"]["requests"] if request["drawn"]]
    assert drawn
    assert not manifest.damage(checkpoint)
    ranks(2, overlapped, toml, output, 2, "asynchronous", "", *more)
    assert [step["step"] for step in records(output)] == [1, 2, 3, 4, 5]
    _, extra = newest(output)
    under_way = [request["prompt"] for request in extra["feed"]["requests"]] + extra["feed"]["prompts"]["again"]
    used = reported(output) + under_way
    assert len(used) == extra["feed"]["prompts"]["stream"]["taken"][0] <= 40
    assert len(set(used)) == len(used)
    assert set(drawn) <= set(used)


def stopped_after(toml: Path, output: Path, processes: int, *flags: str) -> None:
    """The asynchronous run, stopped right after its second checkpoint."""
    from megatron_klear.train import gppo

    saved = gppo.save

    def save(config, engine, rollouts, rollout_step, *, blocking):
        saved(config, engine, rollouts, rollout_step, blocking=True)
        if rollout_step == 2:
            raise KeyboardInterrupt

    gppo.save = save
    with pytest.raises(KeyboardInterrupt):
        overlapped(toml, output, processes, "asynchronous", "", *flags)
