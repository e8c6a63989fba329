"""From excerpts to trained: the sets of the data examples are built, and SFT and GPPO train on them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from curation_rows import curate, read, write
from sandboxes import needs_bubblewrap
from tiny_run import SHAPE

from megatron_klear.cli.curate import main
from megatron_klear.cli.prepare_data import main as prepare
from megatron_klear.data.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SFT = """
output = "sft"
[model]
path = "model"
weights = "random"
dtype = "fp32"
[data]
train = ["runs/data_math/sft/rows.jsonl", "runs/data_code/sft/rows.jsonl"]
cache = "cache"
workers = 1
max_length = 512
tokens_per_microbatch = 1024
[train]
steps = 2
rows_per_step = 1
[checkpoint]
export_hf = true
[logging]
tensorboard = false
"""
GPPO = """
output = "gppo"
[model]
path = "sft/hf"
dtype = "fp32"
[prompts]
max_tokens = 512
sources = [{ files = ["runs/data_math/math_rl/rows.jsonl"] }, { files = ["runs/data_code/code_rl/rows.jsonl"] }]
[sampling]
samples_per_prompt = 3
max_tokens = 12
stop_token_ids = %s
[reward]
workers = 1
timeout_seconds = 65.0
[algorithm]
prompts_per_step = 12
prompts_per_update = 12
max_generation_rounds = 1
overlong_penalty = { buffer_tokens = 12 }
[train]
steps = 1
tokens_per_microbatch = 1024
segment_multiple = 8
[logging]
tensorboard = false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the two data examples have been built, at the paths that they name."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "examples").symlink_to(ROOT / "examples")
    before = Path.cwd()
    os.chdir(folder)
    try:
        prepare(["code", "--count", "100", "--output", "runs/data_code_tasks/rows.jsonl"])
        for example in ("math", "code"):
            main(["build", "--config", f"examples/data_{example}.toml"])
    finally:
        os.chdir(before)
    return folder


def train(folder: Path, script: str, config: str) -> dict[str, float]:
    """The last line of metrics of an entry script's run."""
    (folder / f"{script}.toml").write_text(config)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script), "--config", f"{script}.toml"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    output = config.split('"')[1]
    return json.loads((folder / output / "metrics.jsonl").read_text().splitlines()[-1])


@needs_bubblewrap
def test_the_sets_have_what_their_steps_say(folder):
    report = json.loads((folder / "runs/data_math/report.json").read_bytes())
    assert report["sets"]["sft"]["rows"] == 500
    assert report["sets"]["math_rl"]["steps"][-1]["shares"] == {"gsm8k": 200, "sums": 200}
    tested = json.loads((folder / "runs/data_code/code_rl/3-filter-code/report.json").read_bytes())
    assert tested["references"] == {"passed": tested["counts"]["rows"]}
    assert tested["counts"]["kept"] == tested["counts"]["rows"] > 150
    code = read(folder / "runs/data_code/code_rl/rows.jsonl")
    assert len(code) == 150
    assert {row["curated_from"] for row in code} == {"mbpp", "functions"}
    items = {json.loads(line)["text"] for line in (ROOT / "examples/data/mbpp_test_50.jsonl").open()}
    assert not [row for row in code if row["prompt"][0]["content"].partition(" Your program")[0] in items]


@needs_bubblewrap
def test_sft_and_gppo_train_on_the_three_sets(folder):
    write_tiny_model(folder / "model", "qwen3", SHAPE, weights=False)
    assert train(folder, "pretrain_sft.py", SFT)["step"] == 2
    # One token in eight ends a response, so that lengths differ, and rewards by the penalty on long ones.
    last = train(folder, "train_gppo.py", GPPO % list(range(64)))
    assert last["step"] == 1
    assert last["grad_norm"] > 0
    drawn = read(folder / "gppo" / "rollouts" / "step-00000001.jsonl")
    sources = {sample["data_source"] for sample in drawn}
    assert sources & {"gsm8k", "arithmetic"}
    assert sources & {"mbpp", "code_tasks"}
    assert not [sample for sample in drawn if sample["verdict"] == "error"]


def test_released_lists_are_curated_against_the_real_benchmarks(shared_data, tmp_path):
    problems = json.loads((shared_data / "math" / "math_train_7474.json").read_bytes())
    rows = [
        {"prompt": row["problem"], "data_source": "math", "reward_model": {"ground_truth": row["answer"]}}
        for row in problems
    ]
    (tmp_path / "math.json").write_text(json.dumps(rows, indent=1))
    aime = shared_data / "aime_hmmt"
    against = [shared_data / "math" / "math500_test.json", aime / "aime24.qs.jsonl", aime / "aime25.parquet"]
    given = ("--against", *against, "--rule", "careful")
    write(tmp_path / "math.jsonl", *rows)
    for kind in ("json", "jsonl"):
        output = tmp_path / kind / "rows.jsonl"
        report = curate("decontaminate", "--input", tmp_path / f"math.{kind}", "--output", output, *given)
        # Two rows have no answer.
        assert report["counts"] == {"rows": 7474, "kept": 7292, "dropped": 180, "bad": 2}
    assert read(tmp_path / "json" / "rows.jsonl") == read(tmp_path / "jsonl" / "rows.jsonl")
