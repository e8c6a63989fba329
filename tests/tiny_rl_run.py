"""A run of reinforcement learning small enough to be trained, killed and started again many times in a test.

The model is random, so no answer is right; rewards differ by the penalty on long responses, whose lengths differ
because one token in eight ends them.
"""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

from megatron_klear.config.start import GPPOStart, start_gppo
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
[prompts]
max_tokens = 64
sources = [{{ generator = "arithmetic", count = 40, settings = {{ seed = 1, terms = 2, digits = 1 }} }}]
[sampling]
samples_per_prompt = 3
max_tokens = 12
stop_token_ids = {stops}
[reward]
workers = 1
[algorithm]
prompts_per_step = 4
prompts_per_update = 2
max_generation_rounds = 2
overlong_penalty = {{ buffer_tokens = 12 }}
[train]
steps = 5
tokens_per_microbatch = 160
segment_multiple = 8
[checkpoint]
save_every = 1
export_hf = false
[logging]
tensorboard = false
"""


def write_run(folder: Path) -> Path:
    """Write model and settings into `folder`; returns the settings file."""
    write_tiny_model(folder / "model", "qwen3", SHAPE, weights=False)
    (folder / "run.toml").write_text(TOML.format(folder=folder, stops=list(range(64))))
    return folder / "run.toml"


def start(toml: Path, *flags: str, processes: int = 1) -> GPPOStart:
    """The run of a settings file, checked as the entry script does."""
    return replace(start_gppo(["--config", str(toml), *flags]), world_size=processes)


def train(start: GPPOStart) -> str:
    """What a rank runs: train to the end; returns what was printed."""
    from megatron_klear.train import rl_run

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        rl_run.run(start)
    return out.getvalue()
