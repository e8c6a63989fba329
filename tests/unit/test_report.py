"""The report of a run: what it draws, says, leaves out and refuses, and that nothing of a run can break the page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic_runs import make_rl_run, make_sft_run, write_lines
from tokenizers import Tokenizer

from megatron_klear.runs.report import ReportError, write_report
from megatron_klear.runs.report.charts import all_charts, thin
from megatron_klear.runs.report.rollouts import read_rollouts
from megatron_klear.runs.report.runs import Curve, read_runs

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTILE = "</script><script>document.title='broken'</script><!--<script> \u2028 \ud800 {{data}} & \" ' \x00"


@pytest.fixture(scope="module")
def rl_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rl_run(tmp_path_factory.mktemp("report") / "gppo")


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sft_run(tmp_path_factory.mktemp("report") / "sft")


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


def report(runs: list[Path], folder: Path, **options: object) -> dict:
    return data_of(write_report(runs, folder / "report.html", **options))


def charts_by_id(data: dict) -> dict[str, dict]:
    return {chart["id"]: chart for chart in data["charts"]}


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=900),
    st.integers(min_value=8, max_value=400),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_thinning_keeps_ends_and_extremes(values: list[float | None], points: int):
    curve = Curve(steps=list(range(0, 3 * len(values), 3)), values=values)
    short = thin(curve, points)
    assert len(short.steps) <= points
    assert short.steps == sorted(set(short.steps))
    assert {curve.steps[0], curve.steps[-1]} <= set(short.steps)
    whole = dict(zip(curve.steps, curve.values, strict=True))
    assert all(whole[step] == value for step, value in zip(short.steps, short.values, strict=True))
    numbers = [value for _, value in curve.finite()]
    if numbers:
        kept = [value for _, value in short.finite()]
        assert (min(kept), max(kept)) == (min(numbers), max(numbers))


def test_rl_run_has_every_curve_key_number_and_rollout(rl_run: Path, tmp_path: Path):
    data = report([rl_run], tmp_path)
    charts = charts_by_id(data)
    lines = {
        "reward_mean",
        "accuracy",
        "response_length_mean",
        "entropy",
        "grad_norm",
        "loss",
        "learning_rate",
        "kl_k3",
    }
    assert lines | {"mismatch_mean", "zero_advantage_share"} <= charts.keys()
    assert [part["name"][0] for part in charts["clip_regions-0"]["series"]] == ["1", "2", "3", "4", "5"]
    assert charts["seconds-0"]["series"][0]["name"] == "generate", "the longest phase lies at the bottom"
    assert [series["name"] for series in charts["accuracy"]["series"]] == ["training", "validation"]
    (run,) = data["runs"]
    metrics = [json.loads(line) for line in (rl_run / "metrics.jsonl").read_text().splitlines()]
    accuracy = next(n for n in run["numbers"] if n["title"] == "Accuracy")
    assert accuracy["first"] == pytest.approx(metrics[0]["accuracy"], rel=1e-4)
    assert accuracy["last"] == pytest.approx(metrics[-1]["accuracy"], rel=1e-4)
    assert accuracy["best"] == pytest.approx(max(m["accuracy"] for m in metrics), rel=1e-4)
    assert run["kind"] == "rl"
    assert run["notes"] == []
    assert [step["step"] for step in run["rollouts"]] == list(range(4, 81, 4))
    assert all(len(step["samples"]) == 12 and step["total"] == 32 for step in run["rollouts"])
    assert "clip_low" in run["config"]


def test_sft_run_has_its_curves_and_no_reader(sft_run: Path, tmp_path: Path):
    data = report([sft_run], tmp_path)
    charts = charts_by_id(data)
    expected = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "packing_efficiency", "entropy", "seconds-0"}
    assert expected <= charts.keys()
    (run,) = data["runs"]
    assert (run["kind"], run["rollouts"], run["notes"]) == ("sft", [], [])
    assert run["tokens"] == 120 * 2600
    assert run["seconds"] == pytest.approx(60)
    loss = next(n for n in run["numbers"] if n["title"] == "Loss, validation")
    assert loss["best"] == loss["last"] < loss["first"]


def test_time_outside_of_steps_counts_into_the_duration(tmp_path: Path):
    steps = [
        {"step": 1, "step_seconds": 2.0, "seconds/train": 1.5},
        {"step": 2, "step_seconds": 2.0, "seconds/save": 5.0},
    ]
    write_lines(tmp_path / "run" / "metrics.jsonl", steps)
    assert read_runs([tmp_path / "run"])[0].seconds == 7.0


def test_verdict_shares_sum_to_one_at_every_step(rl_run: Path):
    charts, _ = all_charts(read_runs([rl_run]))
    chart = next(c for c in charts if c["id"] == "verdicts-0")
    for shares in zip(*(part["y"] for part in chart["series"]), strict=True):
        assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_compared_runs_share_charts_and_show_where_they_differ(rl_run: Path, tmp_path: Path):
    other = make_rl_run(tmp_path / "ppo", skill=0.5, loss="ppo", seed=3)
    data = report([rl_run, other], tmp_path, title="GPPO against PPO")
    assert data["title"] == "GPPO against PPO"
    assert [run["name"] for run in data["runs"]] == ["gppo", "ppo"]
    reward = charts_by_id(data)["reward_mean"]["series"]
    assert [series["run"] for series in reward] == [0, 1]
    assert {"clip_regions-0", "clip_regions-1"} <= charts_by_id(data).keys()
    assert data["differences"] == [{"key": "loss.kind", "values": ["gppo", "ppo"]}]


def test_runs_of_one_name_are_told_apart_and_one_run_named_twice_is_refused(tmp_path: Path):
    first, second = make_sft_run(tmp_path / "a" / "run"), make_sft_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([first, second])] == ["a/run", "b/run"]
    with pytest.raises(ReportError, match="named twice"):
        read_runs([first, first])


def test_hostile_text_stays_text(tmp_path: Path):
    folder = make_rl_run(tmp_path / "<img src=x onerror=alert(1)>", steps=4)
    path = folder / "rollouts" / "step-00000004.jsonl"
    rollout = json.loads(path.read_text().splitlines()[0])
    hostile = dict.fromkeys(("prompt", "response", "note", "prompt_id", "data_source", "verdict", "finish"), HOSTILE)
    write_lines(path, [rollout | hostile | {"tokens": [HOSTILE], "logprobs": [-1.0], "ratio": [float("inf")]}])
    (folder / "config.toml").write_text(f"# {HOSTILE}".encode("utf-8", "replace").decode())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics.jsonl", [m | {"</script>": 1.0} for m in metrics])
    page = write_report([folder], tmp_path / "report.html", title=HOSTILE.replace("\ud800", ""))
    text = page.read_text()
    assert text.count("</script>") == 3, "the error hook, the data and the page's script, nothing more"
    assert "<img" not in text
    sample = data_of(page)["runs"][0]["rollouts"][0]["samples"][0]
    assert sample["prompt"] == HOSTILE.replace("\ud800", "\ufffd")
    assert sample["ratio"] == [None]


def test_page_asks_for_nothing_from_a_network(rl_run: Path, tmp_path: Path):
    text = write_report([rl_run], tmp_path / "report.html").read_text()
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}, "the name of SVG, not a link"
    assert not re.search(r"\ssrc=|<link|@import|url\(|fetch\(|XMLHttpRequest", text)


def test_long_responses_keep_their_ends_and_the_page_its_size(rl_run: Path, tmp_path: Path):
    folder = make_rl_run(tmp_path / "long", steps=4)
    tokens = [f"<{i} " for i in range(20_000)]
    rollout = json.loads((folder / "rollouts" / "step-00000004.jsonl").read_text().splitlines()[0])
    rollout |= {"tokens": tokens, "response": "".join(tokens), "logprobs": [-0.123456] * 20_000, "ratio": None}
    for step in range(1, 31):
        write_lines(folder / "rollouts" / f"step-{step:08d}.jsonl", [rollout] * 4)
    page = write_report([folder], tmp_path / "report.html")
    assert page.stat().st_size < 5_000_000
    steps = data_of(page)["runs"][0]["rollouts"]
    assert [step["step"] for step in steps] == list(range(1, 31)), "every step keeps a sample before any keeps two"
    sample = steps[0]["samples"][0]
    assert (sample["numTokens"], sample["cutAt"]) == (20_000, 700)
    assert sample["tokens"] == tokens[:700] + tokens[-500:]
    assert len(sample["logprobs"]) == 1200


def test_a_step_shows_each_verdict_before_repeating_one_and_the_budget_holds(rl_run: Path):
    (run,) = read_runs([rl_run])
    for step in read_rollouts(run, samples_per_step=3, budget_bytes=10**9):
        names = {line.split('"verdict": "')[1].split('"')[0] for line in _rollout_lines(rl_run, step.step)}
        assert {sample["verdict"] for sample in step.samples} == names
    small = read_rollouts(run, samples_per_step=12, budget_bytes=20_000)
    assert 0 < len(json.dumps([step.samples for step in small], separators=(",", ":"))) < 21_000


def _rollout_lines(folder: Path, step: int) -> list[str]:
    return (folder / "rollouts" / f"step-{step:08d}.jsonl").read_text().splitlines()


def test_numbers_that_do_not_match_the_tokens_are_not_shown(tmp_path: Path):
    folder = make_rl_run(tmp_path / "run", steps=4)
    path = folder / "rollouts" / "step-00000004.jsonl"
    rollout = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(rollout | {"logprobs": [-1.0]}) + "\n" + '{"step": 4, "prompt": "torn')
    data = report([folder], tmp_path)
    assert data["runs"][0]["rollouts"][0]["samples"][0]["logprobs"] is None
    assert any("step-00000004.jsonl" in note for note in data["runs"][0]["notes"])


def test_token_ids_become_texts_by_the_tokenizer_of_the_model(tmp_path: Path):
    folder = make_rl_run(tmp_path / "run", steps=4)
    path = folder / "rollouts" / "step-00000004.jsonl"
    tokenizer = Tokenizer.from_file(str(ROOT / "examples" / "tiny_tokenizer" / "tokenizer.json"))
    response = "<think>\n12 + 30 = 42, so π ≈ 🙂</think> done"
    ids = tokenizer.encode(response, add_special_tokens=False).ids
    rollout = json.loads(path.read_text().splitlines()[0]) | {"response": response, "token_ids": ids, "ratio": None}
    write_lines(path, [{k: v for k, v in rollout.items() if k != "tokens"} | {"logprobs": [-0.5] * len(ids)}])
    (folder / "config.toml").write_text(f'[model]\npath = "{ROOT / "examples" / "tiny_tokenizer"}"\n')
    sample = report([folder], tmp_path)["runs"][0]["rollouts"][0]["samples"][0]
    assert "".join(sample["tokens"]) == response
    assert len(sample["tokens"]) == len(sample["logprobs"]) == len(ids)
    (folder / "config.toml").write_text('[model]\npath = "moved/away"\n')
    data = report([folder], tmp_path)["runs"][0]
    sample = data["rollouts"][0]["samples"][0]
    assert "tokens" not in sample
    assert sample["response"] == response
    assert any("moved/away" in note for note in data["notes"])


def test_long_runs_are_thinned(tmp_path: Path):
    folder = make_sft_run(tmp_path / "long", steps=6000)
    page = write_report([folder], tmp_path / "report.html")
    assert page.stat().st_size < 400_000
    for chart in data_of(page)["charts"]:
        assert all(len(series["x"]) <= 400 for series in chart["series"])


def test_a_page_says_what_is_missing(tmp_path: Path):
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    text = '{"step": 1, "loss": NaN, "reward_mean": -0.5}\n{"step": 2, "loss": 1.5, "skipped": true}\n{"step": 3, "lo'
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    data = report([tmp_path / "run"], tmp_path)
    notes = " ".join(data["runs"][0]["notes"])
    for word in ("config.toml", "validation.jsonl", "rollouts", "accuracy", "1 steps were skipped", "1 of 3 lines"):
        assert word in notes
    assert charts_by_id(data)["loss"]["series"][0]["y"] == [None, 1.5]


def test_what_never_changes_is_a_line_and_no_chart(tmp_path: Path):
    records = [{"step": step, "loss": 1.0, "retries": 0.0, "spread": float(step)} for step in (1, 2, 3)]
    write_lines(tmp_path / "one" / "metrics.jsonl", records)
    write_lines(tmp_path / "two" / "metrics.jsonl", [record | {"retries": 1.0} for record in records])
    alone, both = report([tmp_path / "one"], tmp_path), report([tmp_path / "one", tmp_path / "two"], tmp_path)
    assert "The same at every step: retries 0." in alone["notes"]
    assert {"loss", "spread"} <= charts_by_id(alone).keys(), "a metric that the report knows has its chart"
    assert "retries" not in charts_by_id(alone)
    assert "retries" in charts_by_id(both), "runs that differ are drawn"
    assert not any("at every step" in note for note in both["notes"])


def test_a_run_without_steps_has_a_page(tmp_path: Path):
    write_lines(tmp_path / "run" / "metrics.jsonl", [])
    data = report([tmp_path / "run"], tmp_path)
    assert data["charts"] == []
    assert any("no step yet" in note for note in data["runs"][0]["notes"])


def test_a_folder_that_is_no_run_is_refused_and_an_older_page_stays(tmp_path: Path, sft_run: Path):
    page = tmp_path / "report.html"
    page.write_text("older")
    command = [sys.executable, str(ROOT / "tools" / "report.py"), str(sft_run), str(tmp_path), "--out", str(page)]
    ran = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert ran.returncode == 1
    assert f"{tmp_path} has no metrics.jsonl" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert page.read_text() == "older"
    with pytest.raises(ReportError, match="no such folder"):
        write_report([tmp_path / "absent"], page)


def test_figures_are_written_for_every_chart(rl_run: Path, tmp_path: Path):
    data = report([rl_run], tmp_path, title="costs $5 or $6", png=tmp_path / "figures")
    figures = list((tmp_path / "figures").glob("*.png"))
    assert len(figures) == len(data["charts"]) + 1
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in figures)
