"""The report as a browser sees it: no script error, charts drawn, and hovering, clicking and reading work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import make_rl_run

from megatron_klear.runs.report import write_report

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = next(
    filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install chromium to look at the page")

# What a reader does, run inside the page; it leaves what came of it in an attribute.
PROBE = """<script>
const box = document.querySelector("#chart-reward_mean svg").getBoundingClientRect();
const at = { clientX: box.x + box.width / 2, clientY: box.y + 50, bubbles: true };
document.querySelector("#chart-reward_mean svg").dispatchEvent(new MouseEvent("mousemove", at));
const tip = document.getElementById("tooltip").textContent;
const crosses = document.querySelectorAll(".cross[visibility=visible]").length;
document.querySelector("#chart-reward_mean svg").dispatchEvent(new MouseEvent("click", at));
const step = document.querySelector("#reader b").textContent;
document.querySelector("[data-shade=logprobs]").click();
const shaded = document.querySelectorAll(".response span[style]").length;
document.querySelector("[data-shade=none]").click();
const plain = document.querySelectorAll(".response span[style]").length;
document.querySelectorAll(".samples button")[1].click();
const current = [...document.querySelectorAll(".samples button")].findIndex((one) => one.ariaCurrent === "true");
const slider = document.querySelector("#bar input[type=range]");
slider.value = 0; slider.dispatchEvent(new Event("input"));
const raw = document.querySelectorAll("path.raw").length;
const line = () => document.querySelector("#chart-entropy path.line").getAttribute("d");
const logButtons = [...document.querySelectorAll("button.log")];
const linear = line();
logButtons.forEach((one) => one.click());
const logarithmic = line();
logButtons.forEach((one) => one.click());
const axes = linear !== logarithmic && linear === line() ? "log differs" : "log is linear";
document.documentElement.dataset.probe = [tip, crosses, step, shaded, plain, current, raw, axes].join("|");
</script></body>"""


def browse(page: Path, folder: Path) -> str:
    """The page's DOM after its scripts have run; a screenshot lies beside it."""
    flags = [
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking",
        "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,1600",
        "--virtual-time-budget=5000",
    ]
    command = [str(CHROMIUM), *" ".join(flags).split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    shot = [f"--screenshot={page.with_suffix('.png')}", page.resolve().as_uri()]
    return subprocess.run([*command, *shot], text=True, capture_output=True, timeout=180, check=True).stdout


def attribute(dom: str, name: str) -> str | None:
    found = re.search(rf'<html[^>]*\sdata-{name}="([^"]*)"', dom)
    return found[1] if found else None


def drawn_charts(dom: str) -> dict[str, str]:
    """The SVG text of each chart that has one."""
    found = re.findall(r'<figure[^>]*id="chart-([^"]+)".*?</figure>', dom, re.DOTALL)
    bodies = re.findall(r'<figure[^>]*id="chart-[^"]+"(.*?)</figure>', dom, re.DOTALL)
    return {name: body for name, body in zip(found, bodies, strict=True) if "<svg" in body}


def test_rl_page_draws_its_charts_and_answers_to_the_reader(tmp_path: Path):
    page = write_report([make_rl_run(tmp_path / "gppo")], tmp_path / "report.html")
    page.write_text(page.read_text().replace("</body>", PROBE))
    dom = browse(page, tmp_path)
    assert attribute(dom, "error") is None
    assert attribute(dom, "ready") == "yes"
    charts = drawn_charts(dom)
    for name in ("reward_mean", "accuracy", "response_length_mean", "entropy", "grad_norm", "loss", "learning_rate"):
        assert re.search(r'class="line training"[^>]*d="M[\d.]+ [\d.]+L', charts[name]), name
    for name in ("clip_regions-0", "seconds-0", "verdicts-0"):
        assert charts[name].count('class="area"') == 5, name
    assert "NaN" not in "".join(charts.values())
    tip, crosses, step, shaded, plain, current, raw, axes = (attribute(dom, "probe") or "").split("|")
    hovered = int(re.match(r"step (\d+)", tip)[1])
    assert 30 < hovered < 50
    assert int(crosses) == len(charts)
    assert abs(int(step.removeprefix("step ")) - hovered) <= 2, "the reader is at the kept step next to the one clicked"
    assert int(shaded) > 5
    assert (plain, current, raw, axes) == ("0", "1", "0", "log differs")


def test_pages_of_compared_and_of_empty_runs_have_no_script_error(tmp_path: Path):
    runs = [make_rl_run(tmp_path / name, steps=12, loss=name) for name in ("gppo", "ppo")]
    dom = browse(write_report(runs, tmp_path / "compared.html"), tmp_path)
    assert (tmp_path / "compared.png").stat().st_size > 50_000, "a blank screen is much smaller"
    assert (attribute(dom, "error"), attribute(dom, "ready")) == (None, "yes")
    assert drawn_charts(dom)["reward_mean"].count('class="line training"') == 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    dom = browse(write_report([tmp_path / "empty"], tmp_path / "empty.html"), tmp_path)
    assert (attribute(dom, "error"), attribute(dom, "ready")) == (None, "yes")
    assert "no step has been logged" in dom


def test_hostile_text_runs_nothing(tmp_path: Path):
    folder = make_rl_run(tmp_path / "<b>", steps=4)
    text = "<img src=x onerror=\\\"document.documentElement.dataset.error='ran'\\\"></script>"
    path = folder / "rollouts" / "step-00000004.jsonl"
    path.write_text(path.read_text().replace("Think step by step.", text).replace("<think>", text))
    dom = browse(write_report([folder], tmp_path / "report.html", title=text), tmp_path)
    assert (attribute(dom, "error"), attribute(dom, "ready")) == (None, "yes")
    assert "<img" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)


def test_a_real_fine_tuning_run(tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    model, run = tmp_path / "model", tmp_path / "run"
    make = ["tools/make_tiny_model.py", "--output", str(model), "--family", "qwen3", "--no-weights"]
    settings = {
        "model.path": model,
        "output": run,
        "train.steps": 4,
        "train.validate_every": 2,
        "data.cache": tmp_path / "cache",
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    train = ["pretrain_sft.py", "--config", "examples/sft_tiny_cpu.toml", *flags]
    for arguments in (make, train):
        command = [sys.executable, *arguments]
        ran = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600)
        assert ran.returncode == 0, ran.stderr
    dom = browse(write_report([run], tmp_path / "report.html"), tmp_path)
    assert (attribute(dom, "error"), attribute(dom, "ready")) == (None, "yes")
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "entropy", "seconds-0"} <= drawn_charts(
        dom
    ).keys()
    assert "supervised fine-tuning · 4 steps" in dom
