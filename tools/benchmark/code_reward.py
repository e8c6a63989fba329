"""Soft against hard reward for programs: the tiny code stage trained by either from one start, over several seeds.

    python tools/benchmark/code_reward.py                          examples/gppo_code_tiny_cpu.toml, 3 seeds
    python tools/benchmark/code_reward.py --seeds 0 --train.steps 20

Needs the data and the fine-tuned model that `bash examples/gppo_code_tiny_cpu.sh` makes first. Reports for every run
the share of held-out problems solved (all tests passed) before and after, for either reward the gain, and between them
the difference of gains on the same problems, with 95 % intervals: over problems by the bootstrap, seeds averaged, and
over seeds by Student's t.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

import numpy as np

from megatron_klear.config.files import write_text_atomically
from megatron_klear.runs.held_out import held_out
from megatron_klear.statistics.significance import mean_interval, seed_interval
from tools.benchmark.device import cpu_name

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("soft", "hard")


def train(config: Path, output: Path, kind: str, seed: int, more: list[str]) -> dict[str, Any]:
    """One run from its beginning to its end, and what its folder says of it. Exits where it fails."""
    flags = ["--config", str(config), "--output", str(output), "--seed", str(seed), "--reward.code.kind", kind, *more]
    start = time.monotonic()
    with output.with_suffix(".log").open("w") as log:
        subprocess.run([sys.executable, "train_gppo.py", *flags], cwd=ROOT, check=True, stdout=log, stderr=log)
    validations = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "kind": kind,
        "seed": seed,
        "accuracy": {str(record["step"]): record["accuracy"] for record in validations},
        "gain_of_prompts": gains(output),
        "reward_mean": [round(step["reward_mean"], 4) for step in steps],
        "seconds": round(time.monotonic() - start, 1),
    }


def gains(output: Path) -> dict[str, float]:
    """By how much more often each held-out problem is solved at the end than at the beginning."""
    accuracies = held_out(output)
    first, last = accuracies[min(accuracies)], accuracies[max(accuracies)]
    return {name: last[name] - first[name] for name in first}


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Gains of either reward, and soft minus hard, by problem and by seed."""
    by = {(run["kind"], run["seed"]): run["gain_of_prompts"] for run in runs}
    seeds = sorted({seed for kind, seed in by if all((k, seed) in by for k in KINDS)})
    names = sorted(runs[0]["gain_of_prompts"])
    table = {kind: np.array([[by[kind, seed][name] for name in names] for seed in seeds]) for kind in KINDS}
    table["soft - hard"] = table["soft"] - table["hard"]
    found = {}
    for what, values in table.items():
        of_seeds = seed_interval([float(value) for value in values.mean(1)])
        found[what] = {
            "over_problems": str(mean_interval(values.mean(0))),
            "over_seeds": str(of_seeds) if of_seeds is not None else "one seed",
            "of_seeds": [round(float(value), 4) for value in values.mean(1)],
        }
    return found


def main(argv: list[str] | None = None) -> int:
    """Run everything, write JSON after each run, print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "gppo_code_tiny_cpu.toml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; seconds then say little")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "code_reward", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "code_reward_cpu.json")
    arguments, more = parser.parse_known_args(argv)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    report = {"benchmark": "code_reward", "device": cpu_name(), "arguments": more, "runs": runs}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        begun = [
            pool.submit(train, arguments.config, arguments.runs / f"{kind}_{seed}", kind, seed, more)
            for seed in arguments.seeds
            for kind in KINDS
        ]
        for one in begun:
            run = one.result()
            runs.append(run)
            print(f"seed {run['seed']}, {run['kind']}: {run['accuracy']} in {run['seconds']:.0f} s", flush=True)
            write_text_atomically(arguments.out, json.dumps(report) + "\n")
    report["comparison"] = compare(runs)
    write_text_atomically(arguments.out, json.dumps(report) + "\n")
    print("| reward | gain of solved problems, over problems | over seeds |\n| --- | --- | --- |")
    for what, figures in report["comparison"].items():  # type: ignore[attr-defined]
        print(f"| {what} | {figures['over_problems']} | {figures['over_seeds']} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
