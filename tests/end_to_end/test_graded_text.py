"""What a reward reads is what the model wrote: real output of the engines, graded in a run, for every answer form."""

import json
from pathlib import Path

import numpy as np
import pytest
from memorised_model import write_memorised_model, write_problems
from standin_server import write_standin_python
from tiny_rl_run import TOML, start, train
from vllm_server import vllm_python

from megatron_klear.rollout.engine import group_of
from megatron_klear.types import Prompt, Sample

THOUGHT = "<think>\n5 + 67\n</think>\n\n"
FORMS = {
    "boxed?": THOUGHT + "\\boxed{72}",
    "hashes?": THOUGHT + "#### 72",
    "labelled?": THOUGHT + "Answer: 72",
    "bare?": THOUGHT + "72",
}
ROLLOUT = """
[rollout]
kind = "vllm"
server = {{ python = "{python}", device = "cpu", kv_cache_gib = 0.1 }}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_memorised_model(tmp_path_factory.mktemp("memorised") / "model", FORMS)


def settings(folder: Path, model: Path, engine: str) -> Path:
    """One step of a run that samples greedily and keeps every group."""
    write_problems(folder / "problems.jsonl", FORMS, "72")
    text = TOML.format(folder=folder, stops=[]).replace('weights = "random"\n', "")
    text = text.replace(f"{folder}/model", str(model)).replace("steps = 5", "steps = 1")
    text = text.replace("max_tokens = 12", "max_tokens = 40\ntemperature = 0.0")
    text = text.replace("max_generation_rounds = 2", "max_generation_rounds = 1\ndrop_zero_advantage = false")
    lines = [line for line in text.splitlines() if not line.startswith(("sources =", "overlong_penalty"))]
    lines.insert(lines.index("[prompts]") + 1, f'sources = [{{ files = ["{folder}/problems.jsonl"] }}]')
    python = write_standin_python(folder / "python") if engine == "stand-in" else vllm_python()
    rollout = "" if engine == "local" else ROLLOUT.format(python=python)
    (folder / "run.toml").write_text("\n".join(lines) + "\n" + rollout)
    return folder / "run.toml"


@pytest.mark.parametrize("engine", ["local", "stand-in", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_every_documented_form_is_graded_as_the_model_wrote_it(tmp_path: Path, model: Path, engine: str):
    run = start(settings(tmp_path, model, engine))
    train(run)
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts/step-00000001.jsonl").read_text().splitlines()]
    assert {row["response"] for row in rows} == set(FORMS.values())
    assert [row["verdict"] for row in rows] == ["right"] * 12
    (step,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert step["accuracy"] == 1.0
    assert step["cut_off_share"] == 0.0


def test_only_the_stop_token_that_ended_a_response_is_left_out():
    prompt = Prompt(id="p", data_source="s", tokens=np.array([1, 2], dtype=np.int32), text="", ground_truth="")

    def sample(*response: int) -> Sample:
        tokens = np.array([1, 2, *response], dtype=np.int32)
        return Sample(tokens=tokens, trained=np.arange(len(tokens)) >= 2)

    samples = [sample(5, 8, 6, 9), sample(5, 6), sample(9), sample(8)]
    group = group_of(prompt, samples, lambda ids: " ".join(map(str, ids)), {9})
    assert group.texts == ["5 8 6", "5 6", "", "8"]  # 8, special but no stop token, is shown where it is written
    assert group.samples is samples
    assert group.samples[0].tokens.tolist() == [1, 2, 5, 8, 6, 9]  # the stop token is trained
