"""Runs with adapters from beginning to end: supervised and reinforced, sampled from, killed, left as folders."""

import pytest
import tiny_rl_run
import tiny_run

from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.adapters import Base
from megatron_klear.models.peft import read_adapter_form
from megatron_klear.models.safetensors_io import SafetensorsFolder
from megatron_klear.runs.folder import checkpoints_of
from megatron_klear.verify.killed_run import at_output, plan_kills, read_metrics, run_killed, run_whole
from megatron_klear.verify.layouts import layouts_named
from megatron_klear.verify.resume import check_metrics, check_state, verify_resume

FLAGS = ("--lora.rank", "4", "--lora.alpha", "8", "--optimizer.learning_rate", "1e-2")


def test_reinforcement_samples_from_the_adapted_model_and_leaves_both_folders(tmp_path, ranks):
    flags = ("--algorithm.kl_coefficient", "0.1", "--checkpoint.export_hf", "true", "--train.steps", "2")
    run = tiny_rl_run.start(tiny_rl_run.write_run(tmp_path), *FLAGS, *flags)
    ranks(1, tiny_rl_run.train, run)
    records = read_metrics(run)
    assert len(records) == 2
    assert all(record["grad_norm"] > 0 and record["mismatch_max"] < 1e-3 for record in records)
    newest = manifest.step_folder(checkpoints_of(run.config), 2)
    assert Base.read(newest).rank == 4
    assert len(read_adapter_form(run.config.output / "adapter").targets) == 7
    assert "lora" not in " ".join(SafetensorsFolder(run.config.output / "hf").specs)


@pytest.mark.slow
def test_a_supervised_run_goes_on_after_kills_and_in_other_layouts(tmp_path):
    start = tiny_run.start(tiny_run.write_run(tmp_path), *FLAGS, "--checkpoint.save_every", "1")
    layouts = layouts_named(["TP2", "DP2", "TP2 PP2 CP2 SP"])
    report = verify_resume(start, steps=8, tolerance=1e-5, kills=5, layouts=layouts)
    assert report.passed, [check for check in report.checks if not check.passed]


@pytest.mark.slow
def test_a_reinforced_run_goes_on_after_kills(tmp_path):
    flags = ("--algorithm.kl_coefficient", "0.1")
    run = tiny_rl_run.start(tiny_rl_run.write_run(tmp_path), *FLAGS, *flags)
    whole, killed = (at_output(run, run.config.output.with_name(name)) for name in ("whole", "killed"))
    pace, steps, told = run_whole(whole), run.config.train.steps, []
    happened = run_killed(killed, plan_kills(4, steps, processes=1, seed=3), pace, told.append)
    assert not [problem for kill in happened for problem in kill.damage]
    last = [manifest.step_folder(checkpoints_of(each.config), steps) for each in (whole, killed)]
    checks = [*check_state(*last), check_metrics(read_metrics(whole), read_metrics(killed), steps)]
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
