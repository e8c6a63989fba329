"""Train the same run with rollouts from the local engine and from a vLLM server in each mode, over several seeds.

    python tools/benchmark/rollout_modes.py                                   examples/gppo_vllm_tiny_cpu.toml, 3 seeds
    python tools/benchmark/rollout_modes.py --seeds 0 --modes local asynchronous

Says whether held-out accuracy rises alike: gain of every run on the same prompts, its mean over seeds, seconds, and how
old the policies were that drew the tokens. One server serves all runs, one after another.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

import numpy as np

from megatron_klear.config.files import write_text_atomically
from megatron_klear.config.toml import to_toml
from megatron_klear.runs.held_out import held_out
from megatron_klear.statistics.significance import mean_interval
from tools.benchmark.device import cpu_name

ROOT = Path(__file__).resolve().parents[2]
MODES = {
    "local": (),
    "synchronous": ("--rollout.mode", "synchronous"),
    "one_step_off": ("--rollout.mode", "one_step_off"),
    "asynchronous": ("--rollout.mode", "asynchronous"),
    "asynchronous, uncorrected": ("--rollout.mode", "asynchronous", "--algorithm.correction", "none"),
}
METRICS = ("weight_version_lag_mean", "weight_version_lag_max", "mismatch_mean", "correction_clipped_share")


def train(config: Path, output: Path, mode: str, seed: int, servers: list[str], more: list[str]) -> float:
    """One run from its beginning to its end; its seconds. Exits where it fails."""
    if mode == "local":
        settings = tomllib.loads(config.read_text()) | {"rollout": {"kind": "local", "max_sequences": 256}}
        config = output.with_suffix(".toml")
        write_text_atomically(config, to_toml(settings))
    flags = ["--config", str(config), "--output", str(output), "--seed", str(seed), *MODES[mode], *more]
    if mode != "local":
        flags += ["--rollout.servers", *servers]
    start = time.monotonic()
    subprocess.run([sys.executable, "train_gppo.py", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def outcome(output: Path, seconds: float) -> dict[str, Any]:
    """What a run's folder says of it."""
    validations = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy": {str(record["step"]): record["accuracy"] for record in validations},
        "gain_of_prompts": gains(output),
        "reward_mean": [round(step["reward_mean"], 4) for step in steps],
        "seconds": round(seconds, 1),
        **{name: statistics.fmean(step.get(name, 0.0) for step in steps) for name in METRICS},
    }


def gains(output: Path) -> dict[str, float]:
    """By how much more often each held-out prompt is answered right at the end than at the beginning."""
    accuracies = held_out(output)
    first, last = accuracies[min(accuracies)], accuracies[max(accuracies)]
    return {name: last[name] - first[name] for name in first}


def serve(config: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """Start the servers of the settings; returns their process and addresses once they are healthy."""
    command = [sys.executable, "tools/serve_rollouts.py", "--config", str(config)]
    serving = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    for line in serving.stdout:
        print(line, end="", flush=True)
        if line.startswith("servers = "):
            return serving, json.loads(line.removeprefix("servers = "))
    raise SystemExit(f"the servers did not start: exit code {serving.wait()}")


def table(outcomes: dict[str, list[dict[str, Any]]]) -> str:
    """One line a mode: means over seeds; the interval is the bootstrap over held-out prompts."""
    lines = ["| mode | gain of held-out accuracy | accuracy at the end | lag mean, max | corrected | seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for mode, runs in outcomes.items():
        last = statistics.fmean(list(run["accuracy"].values())[-1] for run in runs)
        gain = mean_interval(np.mean([list(run["gain_of_prompts"].values()) for run in runs], axis=0))
        mean = {name: statistics.fmean(run[name] for run in runs) for name in (*METRICS, "seconds")}
        lines.append(
            f"| {mode} | {gain} | {last:.3f} | "
            f"{mean['weight_version_lag_mean']:.2f}, {mean['weight_version_lag_max']:.2f} | "
            f"{mean['correction_clipped_share']:.2%} | {mean['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run everything, print the table, write JSON after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "gppo_vllm_tiny_cpu.toml")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "rollout_modes", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rollout_modes_cpu.json")
    arguments, more = parser.parse_known_args(argv)
    serving, servers = None, []
    if set(arguments.modes) != {"local"}:
        serving, servers = serve(arguments.config)
    outcomes: dict[str, list[dict[str, Any]]] = {}
    try:
        for seed in arguments.seeds:
            for mode in arguments.modes:
                output = arguments.runs / f"{mode.replace(', ', '_')}_{seed}"
                seconds = train(arguments.config, output, mode, seed, servers, more)
                outcomes.setdefault(mode, []).append(outcome(output, seconds))
                print(f"seed {seed}, {mode}: accuracy {outcomes[mode][-1]['accuracy']} in {seconds:.0f} s", flush=True)
                report = {"benchmark": "rollout_modes", "device": cpu_name(), "arguments": more, "modes": outcomes}
                write_text_atomically(arguments.out, json.dumps(report) + "\n")
    finally:
        if serving is not None:
            serving.send_signal(signal.SIGTERM)
            serving.wait(timeout=60)
    print(table(outcomes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
