"""How often a 95 % interval around avg@k holds the true mean, over simulated benchmarks.

    python tools/benchmark/interval_coverage.py --repeats 2000

Each repeat draws problems' chances from a beta distribution and their samples from those. The evaluation's interval
(beta-binomial posterior) stands beside Student's t and the normal approximation on the same draws.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

import numpy as np
import numpy.typing as npt

from megatron_klear.config.files import write_text_atomically
from megatron_klear.statistics.intervals import benchmark_interval
from megatron_klear.statistics.significance import student_quantile

Ends = tuple[float, float]
CASES = ((30, 64, 1.0, 0.5), (30, 64, 2.0, 0.2), (30, 16, 0.3, 1.2), (279, 8, 0.5, 0.4))
"""Problems, samples, and the beta distribution of chances: benchmarks like AIME, and like LiveCodeBench."""


def intervals(counts: npt.NDArray[np.int64], samples: int) -> dict[str, Ends]:
    """Each kind of interval for one benchmark."""
    shares = counts / samples
    mean, error = float(shares.mean()), float(shares.std(ddof=1) / np.sqrt(len(shares)))
    posterior = benchmark_interval(counts.tolist(), samples)
    t = student_quantile(0.975, len(shares) - 1)
    return {
        "beta_binomial": (posterior.low, posterior.high),
        "student": (mean - t * error, mean + t * error),
        "normal": (mean - 1.96 * error, mean + 1.96 * error),
    }


def coverage(problems: int, samples: int, a: float, b: float, repeats: int, seed: int) -> dict[str, float]:
    """Share of repeats whose interval holds a / (a + b), by kind."""
    rng, true = np.random.default_rng(seed), a / (a + b)
    held: dict[str, int] = {}
    for _ in range(repeats):
        counts = rng.binomial(samples, rng.beta(a, b, problems))
        for kind, (low, high) in intervals(counts, samples).items():
            held[kind] = held.get(kind, 0) + (low <= true <= high)
    return {kind: count / repeats for kind, count in held.items()}


def main(argv: list[str] | None = None) -> int:
    """Simulate every case, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "interval_coverage.json")
    options = parser.parse_args(argv)
    found = []
    print(
        "| problems, samples, true mean | beta-binomial posterior | Student's t | normal |\n| --- | --- | --- | --- |"
    )
    for problems, samples, a, b in CASES:
        shares = coverage(problems, samples, a, b, options.repeats, options.seed)
        found.append({"problems": problems, "samples": samples, "mean": a / (a + b), **shares})
        figures = " | ".join(f"{100 * share:.1f} %" for share in shares.values())
        print(f"| {problems}, {samples}, {a / (a + b):.2f} | {figures} |", flush=True)
    report = {"benchmark": "interval_coverage", "repeats": options.repeats, "seed": options.seed, "cases": found}
    write_text_atomically(options.out, json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
