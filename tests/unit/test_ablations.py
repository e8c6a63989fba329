"""Ablations: recipes whose commands are valid at every scale, what is done again, and how claims are judged."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_klear.ablations.outcome import Outcome, as_json, judge, read_known, read_outcome
from megatron_klear.ablations.plan import AblationError, ArmRun, Preparation, arm_runs, preparations
from megatron_klear.ablations.report import markdown, write_plot
from megatron_klear.ablations.run import owned, prepare, run_all
from megatron_klear.cli.ablate import SETTINGS, main
from megatron_klear.config.ablation import AblationConfig
from megatron_klear.config.read import load
from megatron_klear.statistics.significance import seed_interval

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "ablations").glob("*.toml"))


def recipe(path):
    return load(AblationConfig, ["--config", str(path)])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_command_of_every_recipe_has_valid_settings(path, monkeypatch):
    """At each scale: what a stage reads is what an earlier one leaves, and arms differ."""
    monkeypatch.chdir(ROOT)
    config = recipe(path)
    assert {"tiny", "8b"} <= config.scales.keys()
    for name, scale in config.scales.items():
        planned = arm_runs(config, scale, f"{path.stem}_{name}", Path("runs/ablations"), (0, 1), ())
        assert len({json.dumps(one.stages).replace(str(one.folder), "") for one in planned}) == len(planned)
        for one in planned:
            loaded = [load(SETTINGS[command], flags) for command, *flags in one.stages]
            assert loaded[-1].output == one.result
            assert all(settings.seed == one.seed for settings in loaded)
            assert all(str(settings.output).startswith(str(one.folder)) for settings in loaded)
        if name == "tiny":
            made = [one.creates for one in preparations(scale, config.arms, Path("runs/ablations"))]
            for one in planned:
                for words in one.stages:
                    text = " ".join(words)
                    read = {made for made in made if str(made) in text}
                    assert read, "no stage reads what is prepared"


def outcome(arm, seed, values):
    problems = {f"p{index}": value for index, value in enumerate(values)}
    return Outcome(arm=arm, seed=seed, curve={0: 0.1, 4: sum(values) / len(values)}, of_problems=problems, metrics={})


def config_of(tmp_path, stages=None):
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        title = "T"
        paper = "P."
        design = "D."
        arms = [{ name = "a", settings.gppo = { "loss.kind" = "ppo" } }, { name = "b c" }]
        claims = [{ better = "a", than = "b c", paper = "+1" }]
        [scales.tiny]
        what = "small."
        seeds = [0, 1, 2]
        stages = [{ command = "gppo", flags = ["--output", "{run}/gppo"] }]
        """
    )
    return recipe(path)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.10, 0.11, 0.12], "confirmed"),
        ([-0.10, -0.11, -0.12], "contradicted"),
        ([0.30, -0.05, 0.10], "not settled"),
        ([0.30], "not settled"),
        ([0.02, 0.02], "not settled"),
    ],
)
def test_a_claim_is_judged_by_the_interval_over_seeds(tmp_path, differences, verdict):
    config = config_of(tmp_path)
    outcomes = [outcome("b c", seed, [0.2, 0.4]) for seed in range(len(differences))]
    outcomes += [outcome("a", seed, [0.2 + d, 0.4 + d]) for seed, d in enumerate(differences)]
    (judged,) = judge(config, outcomes)
    assert judged.verdict == verdict
    assert judged.of_seeds == pytest.approx(differences)
    report = markdown(config, config.scales["tiny"], outcomes, [judged])
    assert f"**{verdict}**" in report
    assert "interval over seeds excludes zero, each claim by itself" in report
    assert "bands their range" in report
    content = as_json(config, "tiny", outcomes, [judged])
    assert len(json.loads(json.dumps(content))["runs"]) == 2 * len(differences)
    write_plot(config, outcomes, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(tmp_path):
    """Stages here are `klear losses`, which prints a table in a second."""
    folder = tmp_path / "a_0"
    one = ArmRun(arm="a", seed=0, folder=folder, stages=(("losses",),), result=folder)
    run_all([one], 1)
    first = (folder / "stage-0.log").stat().st_mtime_ns
    run_all([one], 1)
    assert (folder / "stage-0.log").stat().st_mtime_ns == first
    with pytest.raises(AblationError, match=r"neither a validation nor an evaluation; remove .*a_0, and the run is"):
        read_outcome(one, "end")
    made = (folder / "stage-0.json").read_text()
    for damaged in ("", "7"):
        (folder / "stage-0.json").write_text(damaged)
        with pytest.raises(AblationError, match=r"stage-0.json does not say what .*a_0 was made by; remove both"):
            run_all([one], 1)
    (folder / "stage-0.json").write_text(made)
    other = ArmRun(arm="a", seed=0, folder=folder, stages=(("losses", "--help"),), result=folder)
    with pytest.raises(AblationError, match="made with other settings"):
        run_all([other], 1)
    broken = ArmRun(arm="a", seed=1, folder=tmp_path / "a_1", stages=(("losses", "--nothing"),), result=folder)
    with pytest.raises(AblationError, match=r"ended with 2.*(?s:.*)--nothing"):
        run_all([broken], 1)
    assert not (tmp_path / "a_1" / "stage-0.json").exists()
    with pytest.raises(AblationError, match="did not make"):
        prepare([Preparation(creates=tmp_path / "absent", arguments=("losses",))])


def test_runs_of_another_day_are_taken_where_their_commands_are_the_same(tmp_path):
    config = config_of(tmp_path)
    planned = arm_runs(config, config.scales["tiny"], "recipe", tmp_path / "elsewhere", (0, 1), ())
    outcomes = [
        replace(outcome(one.arm, one.seed, [0.25, 0.5 + one.seed / 10]), commands=tuple(one.commands()))
        for one in planned
    ]
    known = tmp_path / "result.json"
    known.write_text(json.dumps(as_json(config, "tiny", outcomes, judge(config, outcomes))))
    here = arm_runs(config, config.scales["tiny"], "recipe", tmp_path / "runs", (0, 1, 2), ())
    assert list(read_known(known, here, "end").values()) == outcomes
    main([str(tmp_path / "recipe.toml"), "--known", str(known), "--runs", str(tmp_path / "runs"), "--seeds", "0", "1"])
    again = json.loads((tmp_path / "runs/recipe/result.json").read_text())
    assert again == json.loads(known.read_text())
    other = arm_runs(config, config.scales["tiny"], "recipe", tmp_path / "runs", (0, 1), ("--train.steps", "3"))
    assert read_known(known, other, "end") == {}
    with pytest.raises(AblationError, match="by measure 'end', and the recipe is by 'mean'"):
        read_known(known, here, "mean")
    made, otherwise = (Preparation(creates=tmp_path / "x", arguments=("prepare", "--count", n)) for n in ("4", "5"))
    known.write_text(json.dumps(as_json(config, "tiny", outcomes, judge(config, outcomes), [made])))
    assert list(read_known(known, here, "end", [made]).values()) == outcomes
    with pytest.raises(AblationError, match="share was made otherwise: `prepare --count 4` is not of both"):
        read_known(known, here, "end", [otherwise])
    known.write_text("{}")
    with pytest.raises(AblationError, match="no result of an ablation"):
        read_known(known, here, "end")


def test_the_page_tells_what_the_committed_results_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main(["--summary", "examples/ablations/results"])
    table = capsys.readouterr().out
    assert table in (ROOT / "docs" / "ablations.md").read_text()
    for path in (ROOT / "examples" / "ablations" / "results").glob("*/result.json"):
        content = json.loads(path.read_text())
        name, scale = path.parent.name, content["scale"]
        config = recipe(ROOT / "examples" / "ablations" / f"{name.removesuffix(f'_{scale}')}.toml")
        config = config.at(config.scales[scale])
        planned = arm_runs(config, config.scales[scale], name, Path("runs/ablations"), config.scales[scale].seeds, ())
        prepared = preparations(config.scales[scale], config.arms, Path("runs/ablations"))
        known = read_known(path, planned, config.measure, prepared)
        assert len(known) == len(planned) == len(content["runs"]), "the results are of another recipe: run it again"


@pytest.mark.parametrize(
    ("name", "unit", "rows"),
    [
        (
            "lora",
            1,
            {"all weights, rate 3e-4": "all weights", "all weights, rate 9e-4": "", "adapters, rate 3e-3": "adapters"},
        ),
        ("clip_smollm2", 100, {"GPPO": "", "clip-higher": "", "CISPO": ""}),
    ],
)
def test_the_examples_tell_what_the_committed_results_say(name, unit, rows):
    """Accuracy before (where the table has it), after either validation by seed, and the mean that counts."""
    runs = json.loads((ROOT / "examples/ablations/results" / name / "result.json").read_text())["runs"]
    lines = (ROOT / "examples" / "README.md").read_text().splitlines()
    for shown, arm in rows.items():
        own = [run for run in runs if run["arm"] == (arm or shown)]
        before, first, last = zip(*(run["curve"].values() for run in own), strict=True)
        mean = seed_interval([run["accuracy"] for run in own])
        expected = [*first, *last, mean.value, mean.low, mean.high]
        expected = [before[0], *expected] if name == "lora" else expected
        (line,) = [line for line in lines if line.startswith(f"| {shown} |")]
        told = [float(number) for number in re.findall(r"\d\.\d+|\d\d\.\d", line.removeprefix(f"| {shown} |"))]
        assert told == pytest.approx([unit * value for value in expected], abs=0.0006 * unit), shown


def test_flags_for_all_arms_go_to_the_last_stage_that_trains(tmp_path, capsys):
    config_of(tmp_path)
    main([str(tmp_path / "recipe.toml"), "--dry-run", "--seeds", "7", "--train.steps", "3"])
    a, b = capsys.readouterr().out.splitlines()
    assert a.endswith("/a_7/gppo --loss.kind ppo --train.steps 3 --seed 7")
    assert b.endswith("/b_c_7/gppo --train.steps 3 --seed 7")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "recipe.toml"), "--scale", "huge"])
    assert "no scale 'huge': tiny" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["soft", "hard"])
def test_the_examples_tell_of_the_code_stage_what_its_results_say(arm):
    """Solved before, means over seeds after 10 and 20 steps, the end by seed."""
    runs = json.loads((ROOT / "examples/ablations/results/soft_reward/result.json").read_text())["runs"]
    curves = [run["curve"] for run in runs if run["arm"] == arm]
    means = [sum(curve[step] for curve in curves) / len(curves) for step in ("0", "10", "20")]
    (line,) = [one for one in (ROOT / "examples/README.md").read_text().splitlines() if one.startswith(f"| {arm} |")]
    told = [float(number) for number in re.findall(r"\d\.\d+", line)]
    assert told == pytest.approx([*means, *(curve["40"] for curve in curves)], abs=0.0006)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--job", "2"), "there is no setting job"),
        (("--seeds", "-1"), "seed is -1"),
        (("--train.steps", "few"), 'train.steps is "few"'),
    ],
)
def test_settings_that_no_stage_has_are_told_before_anything_is_made(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        main(["examples/ablations/clip.toml", "--runs", str(tmp_path), *flags])
    assert left.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("arms", "more", "seeds", "words"),
    [
        ('[{ name = "a" }, { name = "b" }]', (), (0, 1, 0), "one is there twice"),
        ('[{ name = "a" }, { name = "b" }]', ("--train.steps", "3"), (0,), "no stage trains"),
        ('[{ name = "a" }, { name = "b" }, { name = "x y" }, { name = "x/y" }]', (), (0,), "would both run in"),
        ('[{ name = "a", values.n = "1" }, { name = "b", values.n = "2" }]', (), (0,), "made by two commands"),
    ],
)
def test_what_would_mix_runs_up_is_refused(tmp_path, capsys, arms, more, seeds, words):
    values = 'prepare = [{ creates = "x", command = "losses {n}" }]' if "values" in arms else ""
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        title = "T"
        paper = "P."
        design = "D."
        arms = {arms}
        claims = [{{ better = "a", than = "b", paper = "+1" }}]
        [scales.tiny]
        what = "small."
        result = "{{run}}/evaluation"
        stages = [{{ command = "evaluate", flags = [] }}]
        {values}
        """
    )
    with pytest.raises(SystemExit):
        main([str(path), "--dry-run", "--seeds", *map(str, seeds), *more])
    assert words in capsys.readouterr().err


def test_arms_with_other_problems_are_not_subtracted(tmp_path):
    outcomes = [outcome("a", 0, [0.1, 0.2]), outcome("b c", 0, [0.1, 0.2, 0.9])]
    for some in (outcomes, outcomes[:1]):
        with pytest.raises(AblationError, match=r"differ in 1 held-out problems, for example p2|no seed in common"):
            judge(config_of(tmp_path), some)


@pytest.mark.parametrize("content", ["", '{"name": "x", "rig', '{"name": "x"}', '{"name": "x", "samples": 0}'])
def test_a_result_that_is_cut_is_named(tmp_path, content):
    one = ArmRun(arm="a", seed=0, folder=tmp_path, stages=(), result=tmp_path)
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "result.json").write_text(content)
    with pytest.raises(AblationError, match="is damaged"):
        read_outcome(one, "end")


def test_shared_data_of_another_command_is_refused(tmp_path):
    made = tmp_path / "model"
    one = Preparation(creates=made, arguments=("tiny-model", "--no-weights", "--output", str(made)))
    prepare([one])
    before = made.stat().st_mtime_ns
    prepare([one])
    assert made.stat().st_mtime_ns == before
    with pytest.raises(AblationError, match=r"was made by `tiny-model --no-weights .* wanted by `tiny-model --seed 3"):
        prepare([replace(one, arguments=("tiny-model", "--seed", "3", "--output", str(made)))])
    (tmp_path / "mine").mkdir()
    prepare([Preparation(creates=tmp_path / "mine", arguments=("losses",))])  # what nobody here made is taken


def test_one_ablation_at_a_time_works_in_a_folder(tmp_path, capsys):
    config_of(tmp_path)
    with owned(tmp_path / "runs" / "recipe"), pytest.raises(SystemExit):
        main([str(tmp_path / "recipe.toml"), "--runs", str(tmp_path / "runs")])
    assert "another klear ablate works in" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "recipe" / "a_0").exists()


RUNNER = """
import signal, sys
from pathlib import Path
from megatron_klear.ablations.plan import ArmRun
from megatron_klear.ablations.run import run_all
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
folder = Path(sys.argv[1])
run_all([ArmRun(arm="a", seed=0, folder=folder, stages=(tuple(sys.argv[2:]),) * 2, result=folder)], 1)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_stage_outlives_its_ablation(tmp_path, end):
    """The stage waits for a server that never answers: its connection closes when it ends."""
    row = {"prompt": [{"role": "user", "content": "?"}], "data_source": "gsm8k", "reward_model": {"ground_truth": "2"}}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "c.toml").write_text(f'output = "{tmp_path}/out"\nbenchmarks = []\n')
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        stage = ["evaluate", "--config", f"{tmp_path}/c.toml", "--endpoint.model", "m", "--endpoint.urls"]
        stage += [f"http://127.0.0.1:{server.getsockname()[1]}", "--endpoint.attempts", "1"]
        stage += ["--benchmarks", f'[{{ name = "sums", files = ["{tmp_path}/p.jsonl"] }}]']
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path / "a_0"), *stage])
        connection, _ = server.accept()
        os.kill(runner.pid, end)
        assert runner.wait(60) != 0
        with connection:
            connection.settimeout(60)
            while connection.recv(4096):
                pass
        server.settimeout(0)
        with pytest.raises(BlockingIOError):  # nothing was begun meanwhile
            server.accept()
