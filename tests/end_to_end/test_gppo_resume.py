"""A run of reinforcement learning that is killed and started again is the run that never was."""

import pytest
from tiny_rl_run import start, write_run

from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.runs.folder import checkpoints_of
from megatron_klear.verify.killed_run import at_output, plan_kills, read_metrics, run_killed, run_whole
from megatron_klear.verify.resume import check_metrics, check_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run and its pace."""
    run = start(write_run(tmp_path_factory.mktemp("rl")))
    run = at_output(run, run.config.output.with_name("uninterrupted"))
    return run, run_whole(run)


def final(run):
    return manifest.step_folder(checkpoints_of(run.config), run.config.train.steps)


def rollouts(run) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run.config.output / "rollouts").iterdir())}


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_instants_leave_no_trace(whole, kills: int):
    uninterrupted, pace = whole
    killed = at_output(uninterrupted, uninterrupted.config.output.with_name(f"killed-{kills}"))
    steps = killed.config.train.steps
    told: list[str] = []
    happened = run_killed(killed, plan_kills(kills, steps, processes=1, seed=3), pace, told.append)
    assert len(happened) == kills, told
    assert not [problem for kill in happened for problem in kill.damage]
    checks = [
        *check_state(final(uninterrupted), final(killed)),
        check_metrics(read_metrics(uninterrupted), read_metrics(killed), steps),
    ]
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert rollouts(uninterrupted) == rollouts(killed)


def test_the_run_that_is_compared_with_learns_something(whole):
    records = read_metrics(whole[0])
    assert sum(record["updates"] for record in records) >= 5
    assert all(record["grad_norm"] > 0 for record in records if record["updates"])
    assert all(record["mismatch_max"] < 1e-3 for record in records)
