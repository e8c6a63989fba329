"""The sampler's routes replayed: the trainer's log-probs are the sampler's, and every layout trains alike."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rl_cases import Outcome, largest_difference, take_step
from rl_groups import fixed_groups, gppo_config, with_routes
from tiny_rl_run import TOML, start, train

from megatron_klear.config.base import ParallelConfig
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.rollout.local import decoder
from megatron_klear.types import Group
from megatron_klear.verify.rollouts import RolloutReport, verify_mismatch

FULL, SELECTIVE = {"granularity": "full"}, {"granularity": "selective"}
LAYOUTS = {
    "TP2 SP EP2 selective": ({"tensor": 2, "expert": 2}, 2, SELECTIVE),
    "PP2 VPP2 full": ({"pipeline": 2, "virtual_pipeline": 2}, 2, FULL),
}
MORE = {
    "CP2 EP2": ({"context": 2, "expert": 2}, 2, {}),
    "DP2": ({}, 2, {}),
    "DP4 EP2 full": ({"expert": 2}, 4, FULL),
    "TP2 SP ETP2": ({"tensor": 2, "expert_tensor": 2}, 2, {}),
    "TP2 PP2 SP EP2 selective": ({"tensor": 2, "pipeline": 2, "expert": 2}, 4, SELECTIVE),
    "TP2 CP2 SP EP4": ({"tensor": 2, "context": 2, "expert": 4}, 4, {}),
    "TP2 PP2 CP2 SP EP4 full": ({"tensor": 2, "pipeline": 2, "context": 2, "expert": 4}, 8, FULL),
}
TABLE = LAYOUTS | (MORE if os.environ.get("KLEAR_REPLAY_LAYOUTS") == "1" else {})
SPREAD = 0.3
"""Of what is added to a router's logits to plant flips; they lie about as far apart themselves."""
ON_CPU = ("--parallel.device", "cpu", "--algorithm.correction", "none")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("routes") / "model"
    return write_tiny_model(folder, "qwen3_moe", TinyShape(initializer_range=0.1))


def groups() -> list[Group]:
    """Rollouts whose tokens were all sent to experts at random."""
    return [replace(group, samples=[with_routes(one) for one in group.samples]) for group in fixed_groups()]


def step_on(ranks, model: Path, parallel: dict, processes: int, recompute: dict, replay: str = "sampler") -> Outcome:
    tables = {
        "model": {"weights": "pretrained"},
        "parallel": parallel | {"device": "cpu"},
        "recompute": recompute,
        "algorithm": {"router_replay": replay},
    }
    rollouts = groups() if replay == "sampler" else fixed_groups()
    return ranks(processes, take_step, gppo_config(model, tables), rollouts)[0]


@pytest.fixture(scope="module")
def alone(model, ranks) -> Outcome:
    """What one process makes of the rollouts."""
    return step_on(ranks, model, {}, 1, {})


@pytest.mark.parametrize("layout", list(TABLE))
def test_routes_are_replayed_in_every_layout(model, ranks, alone, layout: str):
    found = step_on(ranks, model, *TABLE[layout])
    for ours, theirs in zip(found.stats, alone.stats, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert ours.metrics["moe_route_mismatch"] == pytest.approx(theirs.metrics["moe_route_mismatch"], abs=1e-3)
        assert ours.metrics["moe_load_max"] == pytest.approx(theirs.metrics["moe_load_max"], rel=1e-6)
    assert found.mismatch == pytest.approx(alone.mismatch, rel=1e-4, abs=1e-6)
    assert largest_difference(found.weights, alone.weights) < 1e-4


def test_the_table_of_layouts_sees_routes(model, ranks, alone):
    """Of 8 experts 2 at random: one token in 28 goes where the router would have sent it."""
    assert alone.stats[0].metrics["moe_route_mismatch"] == pytest.approx(27 / 28, abs=0.03)
    free = step_on(ranks, model, {}, 1, {}, replay="none")
    assert "moe_route_mismatch" not in free.stats[0].metrics
    assert abs(free.stats[0].grad_norm - alone.stats[0].grad_norm) > 1e-2 * alone.stats[0].grad_norm
    assert largest_difference(free.weights, alone.weights) > 1e-4


@contextmanager
def planted_flips() -> Iterator[None]:
    """The sampler's routers choose by logits with noise on them; weights of experts are by those without."""
    generator = torch.Generator().manual_seed(5)

    def choose(mixture: decoder._Mixture, logits: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(logits.shape, generator=generator)
        return (logits + SPREAD * noise).topk(mixture.chosen, dim=-1).indices

    whole, decoder._Mixture.choose = decoder._Mixture.choose, choose
    try:
        yield
    finally:
        decoder._Mixture.choose = whole


def run_with_flips(toml: Path, flags: Sequence[str]) -> None:
    """Train."""
    with planted_flips():
        train(start(toml, *flags))


def verify_with_flips(toml: Path, flags: Sequence[str]) -> RolloutReport:
    """What `tools/verify.py mismatch` finds."""
    with planted_flips():
        return verify_mismatch(start(toml, *flags), prompts=1, tolerance=1e-3)


def settings_of(folder: Path, model: Path) -> Path:
    """A tiny run of two steps in bf16, on the CPU."""
    folder.mkdir()
    text = TOML.format(folder=folder, stops=list(range(64))).replace(f"{folder}/model", str(model))
    text = text.replace('weights = "random"\ndtype = "fp32"', 'dtype = "bf16"').replace("steps = 5", "steps = 2")
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def metrics_of(folder: Path, model: Path, ranks, *flags: str) -> list[dict[str, float]]:
    """Of a run, rollouts and all, with flips planted in the sampler."""
    ranks(1, run_with_flips, settings_of(folder, model), [*ON_CPU, *flags])
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_with_replay_logprobs_are_the_samplers_despite_planted_flips(tmp_path, model, ranks):
    replayed = metrics_of(tmp_path / "replayed", model, ranks, "--algorithm.router_replay", "sampler")
    free = metrics_of(tmp_path / "free", model, ranks)
    for step in replayed:
        assert step["moe_route_mismatch"] > 0.1
        assert step["mismatch_max"] < 1e-4
    for step in free:
        assert step["mismatch_mean"] > 1e-2
        assert step["mismatch_max"] > 0.1


def test_replay_goes_with_the_samplers_log_probs_as_old_ones(model, ranks, alone):
    tables = {
        "model": {"weights": "pretrained"},
        "parallel": ParallelConfig(device="cpu").model_dump(),
        "algorithm": {"router_replay": "sampler", "old_logprobs": "sampler", "correction": "none"},
    }
    (other,) = ranks(1, take_step, gppo_config(model, tables), groups())
    assert other.stats[0].metrics["moe_route_mismatch"] == alone.stats[0].metrics["moe_route_mismatch"]


def test_verify_names_routing_as_the_cause(tmp_path, model, ranks):
    toml = settings_of(tmp_path / "run", model)
    (report,) = ranks(1, verify_with_flips, toml, ON_CPU)
    assert not report.passed
    assert [finding.cause for finding in report.findings if finding.verdict == "found"] == ["routing"], report
    (report,) = ranks(1, verify_with_flips, toml, [*ON_CPU, "--algorithm.router_replay", "sampler"])
    assert report.passed, report
    assert report.mean < 1e-6
