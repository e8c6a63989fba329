"""What adapters save: memory, checkpoint and time of a step beside training all weights, each in a process of its own.

    python tools/benchmark/lora.py                        SmolLM2-135M's shape, random weights, fp32, on the CPU
    python tools/benchmark/lora.py --tokens 512 --steps 3

Peak memory is the most the process held (VmHWM), less what it held when everything was imported. Beside it is what the
plan of the run (`--dry-run`) says. Named baseline: the same run with all weights trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

import numpy as np

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.files import write_text_atomically
from megatron_klear.config.memory import stage_memory
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import read_architecture
from megatron_klear.models.shapes import SHAPES
from megatron_klear.rl.losses import NLL
from megatron_klear.types import Sample
from tools.benchmark.device import cpu_name

ROOT = Path(__file__).resolve().parents[2]
BASELINE = "all weights"
ARMS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "adapters of rank 32": {"rank": 32},
    "adapters of rank 8, attention": {"rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}


def resident_mib(key: str) -> int:
    """`VmHWM` (most so far) or `VmRSS` (now) of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(f"{key}:")).split()[1]) >> 10


def settings(folder: Path, arm: str, tokens: int) -> SFTConfig:
    """Those of a run of the arm on one row of `tokens`."""
    tables: dict[str, Any] = {
        "output": folder / "run",
        "model": {"path": folder, "weights": "random", "dtype": "fp32"},
        "parallel": {"device": "cpu"},
        "data": {"train": ("unused",), "max_length": tokens, "tokens_per_microbatch": tokens},
        "checkpoint": {"asynchronous": False},
    }
    return SFTConfig.model_validate(tables | ({} if ARMS[arm] is None else {"lora": ARMS[arm]}))


def measure(folder: Path, arm: str, tokens: int, steps: int) -> dict[str, Any]:
    """Train on one row and save; to be called in a process of its own."""
    config = settings(folder, arm, tokens)
    samples = [
        Sample(
            tokens=np.random.default_rng(n).integers(0, 1000, tokens // 4, dtype=np.int32),
            trained=np.arange(tokens // 4) >= 8,
        )
        for n in range(4)
    ]
    weights = loss_weights(np.array([num_predicted(sample) for sample in samples]), "token_mean")
    batch = pack(samples, [float(weight) for weight in weights])
    with world(config.parallel, config.seed) as topology:
        imported = resident_mib("VmRSS")
        with closing(Engine(config, topology)) as engine:
            seconds = []
            for _ in range(steps):
                start = time.perf_counter()
                engine.train_step([batch], NLL())
                seconds.append(time.perf_counter() - start)
            peak = resident_mib("VmHWM") - imported
            path = folder / arm.replace(" ", "-")
            engine.save(path)
            written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            planned = stage_memory(config, engine.architecture, 0, 1, tokens, 1)
    shutil.rmtree(path)
    return {
        "arm": arm,
        "peak_mib": peak,
        "planned_mib": planned.total >> 20,
        "checkpoint_mib": round(written / 2**20, 1),
        "step_seconds": round(min(seconds), 2),
    }


def main() -> int:
    """Measure every arm, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="of the row a step trains on")
    parser.add_argument("--steps", type=int, default=3, help="of which the fastest is reported")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lora_cpu.json")
    parser.add_argument("--arm", choices=tuple(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.model, options.arm, options.tokens, options.steps)))
        return 0
    results = []
    with tempfile.TemporaryDirectory(prefix="lora-") as name:
        shutil.copyfile(SHAPES / "SmolLM2-135M-Instruct.json", Path(name) / "config.json")
        parameters = read_architecture(Path(name)).num_parameters
        for arm in ARMS:
            flags = ["--arm", arm, "--model", name, "--tokens", str(options.tokens), "--steps", str(options.steps)]
            ran = subprocess.run([sys.executable, __file__, *flags], cwd=ROOT, check=True, stdout=subprocess.PIPE)
            results.append(json.loads(ran.stdout.splitlines()[-1]))
            print(results[-1], file=sys.stderr, flush=True)
    report = {
        "benchmark": "lora",
        "device": cpu_name(),
        "model": "SmolLM2-135M's shape, random weights, fp32",
        "parameters": parameters,
        "tokens": options.tokens,
        "baseline": BASELINE,
        "results": results,
    }
    write_text_atomically(options.out, json.dumps(report, indent=1) + "\n")
    base = results[0]
    print("| trained | peak MiB | planned MiB | checkpoint MiB | seconds a step |\n| --- | --- | --- | --- | --- |")
    for row in results:
        shares = {key: row[key] / base[key] for key in ("peak_mib", "checkpoint_mib", "step_seconds")}
        print(
            f"| {row['arm']} | {row['peak_mib']} ({shares['peak_mib']:.2f}) | {row['planned_mib']} | "
            f"{row['checkpoint_mib']} ({shares['checkpoint_mib']:.3f}) | "
            f"{row['step_seconds']} ({shares['step_seconds']:.2f}) |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
