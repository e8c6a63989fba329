"""A run small enough to be trained, killed and started again many times in a test."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from megatron_klear.config.start import Start, start_with
from megatron_klear.data.arithmetic import arithmetic_rows
from megatron_klear.data.tiny import TinyShape, write_tiny_model

SHAPE = TinyShape(hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=8)
TOML = """
output = "{folder}/run"
[model]
path = "{folder}/model"
weights = "random"
dtype = "fp32"
[optimizer]
learning_rate = 1e-3
[data]
train = ["{folder}/train.jsonl"]
cache = "{folder}/cache"
workers = 1
max_length = 128
tokens_per_microbatch = 128
[train]
steps = 6
rows_per_step = 2
[checkpoint]
save_every = 2
[logging]
tensorboard = false
"""


def write_run(folder: Path, *, weights: bool = False, rows: int = 100) -> Path:
    """Write model, data and settings into `folder`; returns the settings file."""
    write_tiny_model(folder / "model", "qwen3", SHAPE, weights=weights)
    with open(folder / "train.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in arithmetic_rows(rows))
    (folder / "run.toml").write_text(TOML.format(folder=folder))
    return folder / "run.toml"


def start(toml: Path, *flags: str, processes: int | None = None) -> Start:
    """The run of a settings file, checked as the tools do."""
    return start_with(["--config", str(toml), *flags], processes=processes, files=True)


def train(start: Start) -> str:
    """What a rank runs: train to the end; returns what was printed."""
    from megatron_klear.train import sft

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        sft.run(start)
    return out.getvalue()


def metrics(start: Start) -> list[dict[str, Any]]:
    """The run's metrics.jsonl."""
    return [json.loads(line) for line in (start.config.output / "metrics.jsonl").read_text().splitlines()]
