"""A run that is killed and started again is the run that never was; whatever the instant, however often."""

import shutil
import time

import psutil
import pytest
from tiny_run import metrics, start, train, write_run

from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.mcore.processes import Processes
from megatron_klear.runs.folder import checkpoints_of
from megatron_klear.verify.killed_run import plan_kills
from megatron_klear.verify.layouts import layouts_named
from megatron_klear.verify.resume import verify_resume


@pytest.fixture
def toml(tmp_path):
    return write_run(tmp_path)


def verified(run, **how):
    report = verify_resume(run, steps=8, tolerance=1e-5, **{"kills": 1} | how)
    assert report.passed, [check for check in report.checks if not check.passed]
    return report


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_ten_kills_at_random_instants_leave_no_trace(toml, asynchronous: str):
    every = "1" if asynchronous == "true" else "2"
    run = start(toml, "--checkpoint.asynchronous", asynchronous, "--checkpoint.save_every", every)
    report = verified(run, kills=10)
    assert len(report.kills) == 10
    assert sum(kill.during_save for kill in report.kills) >= 2
    assert any(kill.checkpoint for kill in report.kills)
    assert not list(toml.parent.glob("verify-resume-*"))


def test_killing_one_rank_of_two(toml):
    report = verified(start(toml, processes=2), kills=3)
    assert [kill.kill.rank is None for kill in report.kills] == [True, True, False]


def test_going_on_in_another_layout(toml):
    report = verified(start(toml), layouts=layouts_named(["TP2", "DP2", "TP2 PP2 CP2 SP"]))
    assert [check.passed for check in report.checks[-3:]] == [True, True, True]


def test_impossible_layouts_are_named(toml):
    report = verified(start(toml, "--train.rows_per_step", "1"), layouts=layouts_named(["DP2"]))
    assert report.checks[-1].passed is None
    assert "train.rows_per_step 1" in report.checks[-1].detail


def test_kills_are_spread_and_repeatable():
    kills = plan_kills(40, steps=10, processes=2, seed=1)
    assert kills == plan_kills(40, steps=10, processes=2, seed=1) != plan_kills(40, steps=10, processes=2, seed=2)
    assert {kill.moment for kill in kills} == {"start", "step", "save"}
    assert {kill.step for kill in kills} == set(range(8))
    assert {kill.rank for kill in kills} == {None, 0, 1}


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(toml, ranks):
    run = start(toml)
    ranks(1, train, run)
    checkpoints = checkpoints_of(run.config)
    newest = manifest.step_folder(checkpoints, 6)
    shutil.copytree(newest, toml.parent / "whole")
    damaged = next(newest.glob("__0_*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    told = ranks(1, train, run)[0]
    assert f"WARNING: checkpoint {newest} is damaged" in told
    assert damaged.name in told
    assert "step 4 of 6" in told
    assert compare_checkpoints(newest, toml.parent / "whole").bitwise_equal
    assert (checkpoints / "step-00000006.replaced-1").is_dir()
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_what_a_kill_left_half_done_is_swept(toml, ranks):
    run = start(toml, "--train.steps", "1")
    left = [checkpoints_of(run.config) / name for name in (".saving-step-00000009-1", ".removing-3")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "part").write_text("half")
    ranks(1, train, run)
    assert not any(folder.exists() for folder in left)
    assert manifest.steps(checkpoints_of(run.config)) == [1]


def test_a_killed_run_leaves_no_process(toml):
    run = start(toml, "--checkpoint.save_every", "1", "--train.steps", "1000")
    with Processes(1, train, run) as processes:
        leader = processes._processes[0].pid
        most: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        # The queue's manager and the writer (which forks more, in some versions): caught while a save is under way.
        while len(most) < 2 and time.monotonic() < deadline:
            most = psutil.Process(leader).children(recursive=True)
        processes.kill()
        _, alive = psutil.wait_procs(most, timeout=10)
    assert len(most) >= 2
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
