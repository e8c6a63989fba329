"""A base model, whose eos is not the token that its chat template ends a turn with: SFT, export, GPPO, no setting."""

import json
import random
from pathlib import Path

import pytest
import tiny_rl_run
import tiny_run

from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.convert import megatron_to_hf

SHAPE = TinyShape(num_layers=2)
TURN_END, END_OF_TEXT = 509, 507
STEPS = 120
SFT = """
output = "{folder}/sft"
[model]
path = "{folder}/base"
weights = "random"
dtype = "fp32"
[optimizer]
learning_rate = 3e-3
[data]
train = ["{folder}/sft.jsonl"]
cache = "{folder}/cache"
workers = 1
max_length = 128
tokens_per_microbatch = 2048
segment_multiple = 8
[train]
rows_per_step = 1
steps = {steps}
[checkpoint]
export_hf = true
[logging]
tensorboard = false
"""
RL = """
output = "{folder}/rl"
[model]
path = "{folder}/sft/hf"
dtype = "fp32"
[prompts]
max_tokens = 64
sources = [{{ files = ["{folder}/rl.jsonl"] }}]
[sampling]
samples_per_prompt = 4
max_tokens = 64
[reward]
workers = 1
[algorithm]
prompts_per_step = 16
prompts_per_update = 16
max_generation_rounds = 1
[train]
steps = 1
tokens_per_microbatch = 2048
segment_multiple = 8
[logging]
tensorboard = false
"""


def write_base_model(folder: Path) -> None:
    """A folder as base models have it: eos `<|endoftext|>`, and a chat template whose turns end in `<|im_end|>`."""
    write_tiny_model(folder, "qwen3", SHAPE, weights=False)
    changes = {
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
        "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
        "config.json": {"eos_token_id": END_OF_TEXT},
        "generation_config.json": {"eos_token_id": END_OF_TEXT},
    }
    for name, settings in changes.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | settings))


def write_sums(folder: Path) -> None:
    """Sums of one digit: with worked answers for SFT, with ground truths for GPPO."""
    draw = random.Random(0)
    taught, asked = [], []
    for index in range(1500):
        a, b = draw.randint(0, 4), draw.randint(0, 4)
        prompt = [{"role": "user", "content": f"{a} + {b}?"}]
        answer = f"<think>\n{a} + {b} = {a + b}\n</think>\n\n\\boxed{{{a + b}}}"
        taught.append({"prompt": prompt, "response": answer})
        if index < 16:
            truth = {"ground_truth": str(a + b)}
            asked.append({"prompt": prompt, "data_source": "math", "reward_model": truth})
    for name, rows in (("sft.jsonl", taught), ("rl.jsonl", asked)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the base model and what SFT made of it, and what was printed."""
    folder = tmp_path_factory.mktemp("tuned")
    write_base_model(folder / "base")
    write_sums(folder)
    (folder / "sft.toml").write_text(SFT.format(folder=folder, steps=STEPS))
    (folder / "rl.toml").write_text(RL.format(folder=folder))
    return folder, tiny_run.train(tiny_run.start(folder / "sft.toml"))


def practise(folder: Path, name: str, *flags: str) -> tuple[dict[str, float], list[str], str]:
    """One step of GPPO: its metrics, the responses, and what was printed."""
    output = folder / name
    printed = tiny_rl_run.train(tiny_rl_run.start(folder / "rl.toml", "--output", str(output), *flags))
    (line,) = (output / "metrics.jsonl").read_text().splitlines()
    rollouts = (output / "rollouts/step-00000001.jsonl").read_text().splitlines()
    return json.loads(line), [json.loads(row)["response"] for row in rollouts], printed


def ends_named_in(folder: Path) -> list[object]:
    names = ("generation_config.json", "config.json")
    return [json.loads((folder / name).read_text())["eos_token_id"] for name in names]


def test_it_is_told_once_and_saved_folders_name_both_ends(tuned: tuple[Path, str]):
    folder, printed = tuned
    assert printed.count("turns end in <|im_end|> (509)") == 1
    both = [[TURN_END, END_OF_TEXT]] * 2
    assert ends_named_in(folder / "sft/hf") == both
    checkpoint = manifest.step_folder(folder / "sft/checkpoints", STEPS)
    assert ends_named_in(checkpoint / "hf") == both
    megatron_to_hf(checkpoint, folder / "converted")  # compares a forward pass of transformers on the result
    assert ends_named_in(folder / "converted") == both
    assert ends_named_in(folder / "base") == [END_OF_TEXT] * 2


def test_rollouts_end_as_with_the_token_given_by_hand(tuned: tuple[Path, str]):
    folder, _ = tuned
    found, responses, printed = practise(folder, "exported", "--checkpoint.export_hf", "true")
    by_hand, told_responses, _ = practise(folder, "by_hand", "--sampling.stop_token_ids", f"[{TURN_END}]")
    assert found["cut_off_share"] < 0.1
    assert found["accuracy"] > 0.5
    assert found["accuracy"] == by_hand["accuracy"]
    assert responses == told_responses
    assert "turns end in" not in printed  # the exported folder names the end itself
    assert ends_named_in(folder / "exported/hf") == [[TURN_END, END_OF_TEXT]] * 2


def test_a_checkpoint_beside_the_base_folder_ends_its_turns_too(tuned: tuple[Path, str]):
    folder, _ = tuned
    checkpoint = manifest.step_folder(folder / "sft/checkpoints", STEPS)
    found, _, printed = practise(
        folder, "continued", "--model.path", str(folder / "base"), "--model.checkpoint", str(checkpoint)
    )
    assert found["cut_off_share"] < 0.1
    assert printed.count("turns end in <|im_end|> (509)") == 1


def test_without_the_end_of_turn_every_response_is_cut_off(tuned: tuple[Path, str], monkeypatch: pytest.MonkeyPatch):
    """What the rule is for: with the base model's own end alone nothing stops."""
    from megatron_klear.data.tokenizer import ChatTokenizer

    folder, _ = tuned
    monkeypatch.setattr(ChatTokenizer, "turn_end", None)
    checkpoint = manifest.step_folder(folder / "sft/checkpoints", STEPS)
    found, _, printed = practise(
        folder, "without", "--model.path", str(folder / "base"), "--model.checkpoint", str(checkpoint)
    )
    assert found["cut_off_share"] > 0.9
    assert "no token to stop at" in printed
