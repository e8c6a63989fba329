"""The log of a run: what is written, what a resume takes back, what people see, and MFU."""

import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_klear.config.base import SFTConfig
from megatron_klear.models.architecture import architecture_from_config
from megatron_klear.runs.log import RunLog, Throughput, open_log
from megatron_klear.runs.metrics_file import MetricsFile
from megatron_klear.runs.mfu import peak_tflops, utilisation
from megatron_klear.runs.progress import ProgressLines
from megatron_klear.runs.trackers import TrackerError
from megatron_klear.types import StepStats

QWEN3_06B = architecture_from_config(
    {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
)


def stats(step: int, loss: float = 2.5, **more: object) -> StepStats:
    values: dict = {"grad_norm": 0.5, "learning_rate": 1e-4, "num_tokens": 1000, "num_trained_tokens": 800}
    return StepStats(step=step, loss=loss, num_sequences=3, **(values | more))


def config(output: Path, **logging: object) -> SFTConfig:
    logging = {"tensorboard": False} | logging
    return SFTConfig.model_validate(
        {"output": output, "model": {"path": "m"}, "data": {"train": ["a"]}, "logging": logging}
    )


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@given(written=st.integers(0, 12), resume=st.integers(0, 12), torn=st.integers(0, 40))
@hypothesis_settings(max_examples=50, deadline=None)
def test_every_step_stands_once_however_the_run_was_killed(tmp_path_factory, written, resume, torn):
    """Steps written, killed in the middle of a line, resumed at an earlier checkpoint: the file of a run not killed."""
    resume = min(resume, written)
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(written + 1):  # 0 is what is measured before the first
        file.write(step, {"loss": 1.0 / (step + 1)})
    file.close()
    with path.open("a") as raw:
        raw.write('{"step": 99, "loss": 0.25, "grad_norm": 1.0}\n'[:torn])
    file = MetricsFile(path, resume_step=resume)
    for step in range(resume + 1 if resume else 0, 13):
        file.write(step, {"loss": 1.0 / (step + 1)})
    file.close()
    assert records(path) == [{"step": s, "loss": 1.0 / (s + 1)} for s in range(13)]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_line_is_one_append_and_is_readable_at_once(tmp_path: Path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write(1, {"loss": float("nan"), "skipped": True})
    assert records(tmp_path / "m.jsonl") == [{"step": 1, "loss": None, "skipped": True}]
    file.close()
    file.close()


def test_full_disk_names_the_file():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    file = MetricsFile.__new__(MetricsFile)
    file.path, file._descriptor = full, os.open(full, os.O_WRONLY)
    with pytest.raises(OSError, match=r"cannot write metrics.*/dev/full"):
        file.write(1, {"loss": 1.0})
    file.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Kept:
    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.validations: list[dict] = []
        self.said: list[str] = []

    def step(self, step, values):
        self.steps.append({"step": step} | dict(values))

    def validation(self, step, values):
        self.validations.append({"step": step} | dict(values))

    def say(self, text):
        self.said.append(text)

    def close(self):
        pass


def test_times_throughput_and_packing():
    clock, kept = Clock(), Kept()
    throughput = Throughput(architecture=QWEN3_06B, num_devices=2, peak_tflops=100.0)
    log = RunLog([kept], throughput, clock)
    clock.now = 100.0
    log.start()
    with log.time("data"):
        clock.now += 1.0
    with log.time("train"):
        clock.now += 3.0
    with log.time("validation", outside_step=True):
        clock.now += 50.0
    log.step(stats(1, metrics={"entropy": 0.3}), capacity_tokens=1250, mean_context=500.0)
    first = kept.steps[0]
    assert (first["step_seconds"], first["tokens_per_second"], first["packing_efficiency"]) == (4.0, 250.0, 0.8)
    assert (first["seconds/data"], first["seconds/train"], first["seconds/validation"]) == (1.0, 3.0, 50.0)
    assert first["mfu"] == utilisation(QWEN3_06B, 250.0, 500.0, 100.0, 2)
    assert first["entropy"] == 0.3
    clock.now += 2.0
    log.step(stats(2))
    assert kept.steps[1]["step_seconds"] == 2.0
    assert "seconds/data" not in kept.steps[1]
    assert "mfu" not in kept.steps[1]


def test_mfu_is_absent_without_a_known_gpu_and_follows_the_override(tmp_path: Path):
    assert Throughput.of(config(tmp_path), QWEN3_06B, 1, None).mfu(1e4, 100.0) is None
    assert Throughput.of(config(tmp_path), QWEN3_06B, 1, "Some GPU 9000").mfu(1e4, 100.0) is None
    assert Throughput.of(config(tmp_path), QWEN3_06B, 1, "NVIDIA H100 80GB HBM3").peak_tflops == 989.4
    assert Throughput.of(config(tmp_path, peak_tflops=7.0), QWEN3_06B, 1, None).peak_tflops == 7.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),
        (None, None),
    ],
)
def test_peaks_by_device_name(name: str | None, peak: float | None):
    assert peak_tflops(name) == peak


def test_mfu_by_hand():
    """One token a second on a peak of exactly its FLOPs is an MFU of 1."""
    flops = QWEN3_06B.flops_per_token(0.0)
    assert flops == 6 * (28 * (1024 * (2 * 2048 + 2 * 1024) + 3 * 1024 * 3072) + 151936 * 1024)
    assert utilisation(QWEN3_06B, 1.0, 0.0, flops / 1e12, 1) == pytest.approx(1.0)


def test_a_run_writes_its_files_and_lines(tmp_path: Path):
    shown = io.StringIO()
    with open_log(config(tmp_path), total_steps=10, stream=shown) as log:
        log.step(stats(1), capacity_tokens=1000)
        log.step(stats(2, loss=float("nan"), skipped=True), capacity_tokens=1000)
        log.validation(2, {"loss": 1.5})
        log.say("a message [with brackets]")
    first, second = records(tmp_path / "metrics.jsonl")
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(first)
    assert (second["loss"], second["skipped"]) == (None, True)
    assert records(tmp_path / "validation.jsonl") == [{"step": 2, "loss": 1.5}]
    lines = shown.getvalue().splitlines()
    assert lines[0].startswith("step  1/10  loss   2.5000  grad    0.500  lr 1.00e-04")
    assert lines[0].index("lr") == lines[1].index("lr")
    assert "SKIPPED" in lines[1]
    assert lines[2:] == ["step  2/10  validation  loss 1.5000", "a message [with brackets]"]


def test_other_ranks_write_nothing(tmp_path: Path, capsys):
    with open_log(config(tmp_path / "out"), rank=1) as log, log.time("data"):
        log.step(stats(1))
        log.validation(1, {"loss": 1.0})
        log.say("x")
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_time_left():
    shown = io.StringIO()
    lines = ProgressLines(100, shown)
    values = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "tokens_per_second": 1.0, "step_seconds": 60.0}
    lines.step(10, values)
    assert "eta 1:30:00" in shown.getvalue()


def test_a_terminal_gets_a_bar(tmp_path: Path):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    with open_log(config(tmp_path), total_steps=4, resume_step=1, stream=shown) as log:
        log.step(stats(2))
        log.say("note [x]")
        log.step(stats(4))
    assert "step 4/4" in shown.getvalue()
    assert "note [x]" in shown.getvalue()


def test_tensorboard_hides_what_a_resume_repeats(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, last in ((0, 1), (0, 4), (2, 3)):
        with open_log(config(tmp_path, tensorboard=True), resume_step=resume, stream=io.StringIO()) as log:
            if resume == 0:
                log.validation(0, {"loss": 0.7})
            for step in range(resume + 1, last + 1):
                log.step(stats(step, loss=float(resume + step)))
            log.validation(last, {"loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 5.0)]
    assert [e.step for e in events.Scalars("validation/loss")] == [0, 3]


def test_wandb_is_told_once_per_run_id(tmp_path: Path, monkeypatch):
    calls: list = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: None)
    started: list[dict] = []
    fake = types.SimpleNamespace(init=lambda **settings: (started.append(settings), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume in (0, 1, 0):
        with open_log(config(tmp_path, wandb_project="p"), resume_step=resume, stream=io.StringIO()) as log:
            log.step(stats(resume + 1))
    assert [s["project"] for s in started] == ["p"] * 3
    assert started[0]["id"] == started[1]["id"] != started[2]["id"]
    assert started[0]["config"]["logging"]["wandb_project"] == "p"
    assert calls[0][0] == 1
    assert calls[0][1]["train/loss"] == 2.5


def test_wandb_missing_or_refusing_is_explained(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackerError, match=r"megatron-klear\[wandb\]"):
        open_log(config(tmp_path, wandb_project="p"))

    def refuse(**settings: object) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(TrackerError, match=r"no API key.*WANDB_MODE=offline"):
        open_log(config(tmp_path, wandb_project="p"))


def test_tensorboard_missing_is_explained(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrackerError, match=r"logging\.tensorboard = false"):
        open_log(config(tmp_path, tensorboard=True))
