"""Folders of made-up runs that look like real ones: seeded, with curves that rise, noise, and rollouts to read."""

import json
import random
from math import exp
from pathlib import Path

RL_CONFIG = """output = "runs/made_up"
seed = 7

[model]
path = "data/tiny"

[loss]
kind = "{loss}"
clip_low = 0.2

[algorithm]
advantage = "mean_std"
prompts_per_step = 16
"""


def write_lines(path: Path, records: list[dict]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_sft_run(folder: Path, steps: int = 120, seed: int = 0) -> Path:
    """A run of supervised fine-tuning: metrics, validation, settings."""
    noise = random.Random(seed)
    metrics = []
    for step in range(1, steps + 1):
        loss = 0.7 + 5.5 * exp(-step / (steps / 6)) + noise.gauss(0, 0.05)
        metrics.append(
            {
                "step": step,
                "loss": loss,
                "grad_norm": 0.5 + 2 * exp(-step / 20) + abs(noise.gauss(0, 0.1)),
                "learning_rate": 3e-3 * min(1, step / 10) * (1 - 0.9 * step / steps),
                "tokens_per_second": 5200 + noise.gauss(0, 300),
                "step_seconds": 0.5,
                "num_tokens": 2600,
                "skipped": False,
                "packing_efficiency": 0.93 + noise.gauss(0, 0.02),
                "entropy": loss * 0.95,
                "seconds/data": 0.004,
                "seconds/train": 0.49,
            }
        )
    write_lines(folder / "metrics.jsonl", metrics)
    validation = [{"step": step, "loss": 0.8 + 5.4 * exp(-step / (steps / 6))} for step in range(0, steps + 1, 20)]
    write_lines(folder / "validation.jsonl", validation)
    (folder / "config.toml").write_text('seed = 1\n\n[train]\nrows_per_step = 2\naggregation = "token_mean"\n')
    return folder


def make_rl_run(folder: Path, steps: int = 80, *, skill: float = 1.0, loss: str = "gppo", seed: int = 0) -> Path:
    """A run of reinforcement learning that learns with `skill`, with rollouts every fourth step."""
    noise = random.Random(seed)
    metrics = [_rl_step(step, 0.18 + skill * 0.6 * (1 - exp(-step / 30)), noise) for step in range(1, steps + 1)]
    write_lines(folder / "metrics.jsonl", metrics)
    validated = range(0, steps + 1, 10)
    write_lines(
        folder / "validation.jsonl",
        [{"step": s, "accuracy": 0.16 + skill * 0.6 * (1 - exp(-s / 30)) + noise.gauss(0, 0.01)} for s in validated],
    )
    (folder / "config.toml").write_text(RL_CONFIG.format(loss=loss))
    for step in range(4, steps + 1, 4):
        accuracy = metrics[step - 1]["accuracy"]
        rows = [_rollout(step, prompt, accuracy, noise) for prompt in range(4) for _ in range(8)]
        write_lines(folder / "rollouts" / f"step-{step:08d}.jsonl", rows)
    return folder


def _rl_step(step: int, skill: float, noise: random.Random) -> dict:
    right = sum(noise.random() < skill for _ in range(128))
    wrong = int((128 - right) * 0.8)
    return {
        "step": step,
        "reward_mean": 2 * right / 128 - 1,
        "accuracy": right / 128,
        "response_length_mean": 60 + 90 * skill + noise.gauss(0, 5),
        "entropy": 0.9 * exp(-step / 60) + 0.15 + noise.gauss(0, 0.015),
        "loss": noise.gauss(0, 0.02),
        "grad_norm": 0.3 + abs(noise.gauss(0, 0.08)) + (1.4 if step == 37 else 0),
        "learning_rate": 1e-6 * min(1, step / 10),
        "clip_region_1": 0.004 + abs(noise.gauss(0, 0.001)),
        "clip_region_2": 0.003 + abs(noise.gauss(0, 0.001)),
        "clip_region_3": 0.002 + abs(noise.gauss(0, 0.0005)),
        "clip_region_4": 0.001 + abs(noise.gauss(0, 0.0005)),
        "clip_region_5": 0.0,
        "zero_advantage_share": 0.1 + 0.5 * skill**2 + noise.gauss(0, 0.04),
        "mismatch_mean": 2e-6 + abs(noise.gauss(0, 4e-7)),
        "mismatch_max": 4e-5 + abs(noise.gauss(0, 1e-5)),
        "kl_k3": 0.0004 * step / 10 + abs(noise.gauss(0, 1e-4)),
        "verdict/right": right,
        "verdict/wrong": wrong,
        "verdict/malformed": 128 - right - wrong,
        "verdict/timeout": 1 if step % 23 == 0 else 0,
        "verdict/error": 0,
        "tokens_per_second": 3100 + noise.gauss(0, 120),
        "num_tokens": 14000,
        "step_seconds": 5.1,
        "seconds/generate": 2.6 + abs(noise.gauss(0, 0.3)),
        "seconds/score": 0.3 + abs(noise.gauss(0, 0.05)),
        "seconds/old_logprobs": 0.5,
        "seconds/train": 1.5 + abs(noise.gauss(0, 0.1)),
        "seconds/load_weights": 0.2,
    }


def _rollout(step: int, prompt: int, accuracy: float, noise: random.Random) -> dict:
    first, second = 13 + 7 * prompt, 24 + 3 * prompt
    is_right = noise.random() < accuracy
    answer = first + second + (0 if is_right else noise.choice([-10, 1, 10]))
    verdict = "right" if is_right else noise.choice(["wrong", "wrong", "malformed"])
    tens = f"Tens: {first // 10 * 10} + {second // 10 * 10} = {first // 10 * 10 + second // 10 * 10}.\n"
    ones = f"Ones: {first % 10} + {second % 10} = {first % 10 + second % 10}.\n"
    text = f"<think>\nI add the tens and the ones.\n{tens}{ones}"
    text += "" if verdict == "malformed" else f"</think>\nSo the sum is \\boxed{{{answer}}}."
    tokens = [piece for word in text.split(" ") for piece in (word, " ")][:-1]
    return {
        "step": step,
        "prompt_id": f"sum-{prompt}",
        "data_source": "arithmetic",
        "prompt": f"<|user|>\nWhat is {first} + {second}? Think step by step.\n<|assistant|>\n",
        "response": text,
        "tokens": tokens,
        "logprobs": [-noise.expovariate(2.5) if noise.random() < 0.5 else -noise.random() * 0.02 for _ in tokens],
        "ratio": [exp(noise.gauss(0, 0.18)) for _ in tokens],
        "advantage": 0.9 if is_right else -1.1,
        "reward": 1.0 if is_right else -1.0,
        "verdict": verdict,
        "note": "no </think> in the response" if verdict == "malformed" else f"read {answer}, wanted {first + second}",
        "finish": "length" if verdict == "malformed" else "stop",
        "weight_version": step - 1,
    }
