"""Measure the packing planner: how full rows are, how even the ranks' work, how long and how much memory a plan takes.

    python tools/benchmark/packing.py

Lengths are log-normal with a median of 6K tokens; those above the cap of 32K are left out, as over-long samples are.
Work is that of Qwen3-8B, a * L + b * L^2. Beside the planner runs the plain way: shuffled samples go into a row until
the next one does not fit, rows go to ranks in order. Work imbalance of a step is the largest work of a rank over
the mean one, less one; its mean and 99th percentile over the epoch's full steps are reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

import numpy as np

from megatron_klear.data.packing import (
    EpochPlan,
    RowSettings,
    Work,
    assign_rows,
    plan_epoch,
    sequence_work,
    work_imbalance,
)
from megatron_klear.models.architecture import architecture_from_config
from tools.benchmark.device import cpu_name

MEDIAN_TOKENS, CAP_TOKENS, SEGMENT_MULTIPLE = 6144, 32768, 64
DATA_RANKS, MICROBATCHES = 64, 8
QWEN3_8B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}


def long_cot_lengths(count: int, sigma: float, seed: int = 0) -> np.ndarray:
    """Lengths of `count` samples, log-normal and cut off at the cap."""
    generator = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < count:
        lengths = np.ceil(generator.lognormal(np.log(MEDIAN_TOKENS), sigma, count)).astype(np.int32)
        kept.append(lengths[lengths <= CAP_TOKENS])
    return np.concatenate(kept)[:count]


def plain_plan(lengths: np.ndarray, settings: RowSettings, seed: int) -> EpochPlan:
    """Shuffled samples in order, a new row wherever the next does not fit."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    padded = -(-lengths[order].astype(np.int64) // settings.segment_multiple) * settings.segment_multiple
    bounds, filled = [0], 0
    for index, size in enumerate(padded.tolist()):
        if filled + size > settings.tokens_per_row:
            bounds.append(index)
            filled = 0
        filled += size
    return EpochPlan(samples=order, bounds=np.array([*bounds, len(order)]), rows_per_step=settings.rows_per_step)


def measure(lengths: np.ndarray, plan: EpochPlan, work: Work, balanced: bool) -> dict[str, float]:
    """Fill of the rows and imbalance of the full steps."""
    of_samples = work.of(lengths)
    imbalances, assign_seconds = [], 0.0
    for step in range(plan.num_rows // plan.rows_per_step):
        rows = plan.row_sums(of_samples, plan.step_rows(step))
        start = time.perf_counter()
        assigned = (
            assign_rows(rows, plan.rows_per_step, DATA_RANKS)
            if balanced
            else np.arange(plan.rows_per_step).reshape(DATA_RANKS, MICROBATCHES)
        )
        assign_seconds += time.perf_counter() - start
        imbalances.append(work_imbalance(rows[assigned].sum(axis=1)))
    return {
        "fill": float(lengths.sum() / (plan.num_rows * CAP_TOKENS)),
        "rows": plan.num_rows,
        "imbalance_mean": float(np.mean(imbalances)),
        "imbalance_p99": float(np.percentile(imbalances, 99)),
        "imbalance_max": float(np.max(imbalances)),
        "assign_milliseconds_per_step": 1000 * assign_seconds / len(imbalances),
    }


def main() -> int:
    """Run, print a table, write JSON; exit code 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_500_000)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.5, 0.8, 1.0], help="spread of the log-lengths")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    arguments = parser.parse_args()
    settings = RowSettings(
        tokens_per_row=CAP_TOKENS, segment_multiple=SEGMENT_MULTIPLE, rows_per_step=DATA_RANKS * MICROBATCHES
    )
    works = {
        "qwen3_8b": sequence_work(architecture_from_config(QWEN3_8B)),
        "attention_only": Work(per_token=0.0, per_token_squared=1.0),
    }
    results: list[dict[str, Any]] = []
    for sigma in arguments.sigma:
        lengths = long_cot_lengths(arguments.samples, sigma)
        start = time.perf_counter()
        plan = plan_epoch(lengths, settings, seed=0, epoch=0)
        seconds = time.perf_counter() - start
        plain = plain_plan(lengths, settings, seed=0)
        for name, work in works.items():
            for method, chosen in (("planner", plan), ("plain", plain)):
                measured = measure(lengths, chosen, work, balanced=method == "planner")
                results.append({"sigma": sigma, "work": name, "method": method, **measured})
                print(_line(results[-1]), flush=True)
        results[-2]["plan_seconds"] = results[-4]["plan_seconds"] = seconds
        print(f"  plan of {len(lengths):,} samples (mean {lengths.mean():.0f} tokens): {seconds:.2f} s")
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak memory of the process: {peak_gib:.2f} GiB")
    report = {
        "benchmark": "packing",
        "device": f"{cpu_name()}, one used",
        "samples": arguments.samples,
        "median_tokens": MEDIAN_TOKENS,
        "cap_tokens": CAP_TOKENS,
        "segment_multiple": SEGMENT_MULTIPLE,
        "data_ranks": DATA_RANKS,
        "microbatches": MICROBATCHES,
        "imbalance": "per full step: largest work of a rank / mean work of the ranks - 1",
        "peak_memory_gib": round(peak_gib, 3),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    ours = [one for one in results if one["method"] == "planner" and one["work"] == "qwen3_8b"]
    met = all(one["fill"] >= 0.98 and one["imbalance_p99"] < 0.03 and one["plan_seconds"] < 60 for one in ours)
    print("fill >= 98 %, imbalance < 3 %, plan < 60 s and < 4 GB:", "met" if met and peak_gib < 4 else "MISSED")
    return 0 if met and peak_gib < 4 else 1


def _line(result: dict[str, Any]) -> str:
    return (
        f"sigma {result['sigma']:.1f} {result['work']:<15} {result['method']:<8} fill {result['fill']:.2%}  imbalance "
        f"mean {result['imbalance_mean']:.3%} p99 {result['imbalance_p99']:.3%} max {result['imbalance_max']:.3%}  "
        f"assign {result['assign_milliseconds_per_step']:.2f} ms a step"
    )


if __name__ == "__main__":
    raise SystemExit(main())
