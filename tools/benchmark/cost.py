"""The cost model's answer for Qwen3 of 8B to 235B on 8 to 1,024 GPUs: arithmetic, not a measurement.

    python tools/benchmark/cost.py [--models 8B 235B-A22B] [--gpus 64 1024] [--device H200] [--set matrix_share=0.5]

Of each model and number of GPUs it tries every layout that divides, keeps those that fit and shows the one with the
fewest seconds a training step, term by term, beside the rollout of the same step. Nothing is run and no device is
asked: peaks are those of `config.cost_models.DEVICES` or of --set, and the shares of them that are reckoned with are
assumptions. `megatron_klear/config/cost.py` has each term's formula and source; tests hold its counts against built
models, torch's FLOP counter and counted collectives.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

from megatron_klear.config.checks import check_layout
from megatron_klear.config.cost import Layout, step_flops
from megatron_klear.config.cost_models import DEVICES, PUBLISHED, Device, Model, model_from_config
from megatron_klear.config.cost_seconds import Rollout, RolloutCost, StepCost, rollout_cost, step_cost

GPUS = (8, 64, 256, 1024)
ROW_TOKENS, PROMPT_TOKENS, MEAN_TOKENS, CAP_TOKENS = 32_768, 256, 16_384, 32_768
STEP_ROWS = 512
"""Rows of 32K in a training step: the 16.8 million tokens of 1,024 responses of 16K."""
SEQUENCES = STEP_ROWS * ROW_TOKENS // MEAN_TOKENS
MEAN_CONTEXT = 0.6 * MEAN_TOKENS
"""Tokens that one reads: half the length, a little more where lengths differ (they weigh with their square)."""
GIB = 2**30


def layouts(model: Model, gpus: int) -> Iterator[Layout]:
    """Layouts of a number of cards that divide the model and the step's rows."""
    powers = [1, 2, 4, 8]
    experts = [*powers, 16, 32, 64, 128] if model.experts else [1]
    for tensor, context, pipeline, expert in itertools.product(powers, powers, [*powers, 16], experts):
        data, rest = divmod(gpus, tensor * context * pipeline)
        if rest or not data or STEP_ROWS % data or data * context * tensor % expert:
            continue
        for recompute in ("none", "selective", "full"):
            layout = Layout(
                tensor=tensor,
                context=context,
                pipeline=pipeline,
                data=data,
                expert=expert,
                row_tokens=ROW_TOKENS,
                microbatches=STEP_ROWS // data,
                recompute=recompute,
            )
            if not check_layout(layout.run(), model.architecture, gpus):
                yield layout


def best(model: Model, gpus: int, device: Device) -> tuple[Layout, StepCost] | None:
    """The layout that fits and takes the fewest seconds, None where none fits."""
    costs = ((layout, step_cost(model, layout, device, MEAN_CONTEXT)) for layout in layouts(model, gpus))
    return min((pair for pair in costs if pair[1].fits), key=lambda pair: pair[1].seconds, default=None)


def rollout_of(model: Model, gpus: int, device: Device) -> tuple[Rollout, RolloutCost] | None:
    """The rollout of the same tokens on as many cards, by servers of the size that takes the fewest seconds."""
    found = []
    for tensor in (1, 2, 4, 8):
        rollout = Rollout(
            sequences=SEQUENCES,
            prompt_tokens=PROMPT_TOKENS,
            mean_tokens=MEAN_TOKENS - PROMPT_TOKENS,
            longest_tokens=CAP_TOKENS,
            tensor=tensor,
            servers=gpus // tensor,
        )
        try:
            found.append((rollout, rollout_cost(model, rollout, device)))
        except ValueError:
            continue  # a server of so few cards does not hold the model
    return min(found, key=lambda pair: pair[1].seconds, default=None)


def report_of(name: str, gpus: int, device: Device) -> dict[str, Any]:
    """One line of the report as JSON."""
    model = model_from_config(name, PUBLISHED[name])
    report: dict[str, Any] = {"model": name, "gpus": gpus, "parameters": model.num_parameters}
    if (chosen := best(model, gpus, device)) is not None:
        layout, cost = chosen
        names = ("tensor", "context", "pipeline", "data", "expert", "recompute")
        flops = step_flops(model, layout, MEAN_CONTEXT)
        report["training"] = {
            "layout": {key: getattr(layout, key) for key in names},
            "seconds": cost.seconds,
            "compute_seconds": cost.compute,
            "bubble_seconds": cost.bubble,
            "seconds_of_axis_if_nothing_hides_it": cost.seconds_of_axis,
            "bytes_sent_of_axis": _sent(cost),
            "memory_bytes": {f.name: getattr(cost.memory, f.name) for f in fields(cost.memory)},
            "model_flops_share_of_peak": flops / (cost.seconds * gpus * device.peak_flops),
        }
    if (drawn := rollout_of(model, gpus, device)) is not None:
        rollout, seconds = drawn
        report["rollout"] = {
            "cards_of_server": rollout.tensor,
            "concurrent_of_server": seconds.concurrent,
            "seconds": seconds.seconds,
            **{f.name: getattr(seconds, f.name) for f in fields(seconds) if f.name != "concurrent"},
        }
    return report


def _sent(cost: StepCost) -> dict[str, float]:
    sent: dict[str, float] = {}
    for part in cost.traffic:
        sent[part.axis] = sent.get(part.axis, 0.0) + part.sent
    return sent


def line_of(report: dict[str, Any]) -> str:
    """The report of one model and number of cards, for people."""
    head = f"{report['model']:>10} {report['gpus']:>5} GPUs  "
    training, rollout = report.get("training"), report.get("rollout")
    if training is None:
        head += "no layout fits"
    else:
        layout = training["layout"]
        memory = sum(size for name, size in training["memory_bytes"].items() if name != "host")
        where = f"tp{layout['tensor']} cp{layout['context']} pp{layout['pipeline']} dp{layout['data']}"
        where += (f" ep{layout['expert']}" if layout["expert"] > 1 else "") + f" {layout['recompute']}"
        axes = training["seconds_of_axis_if_nothing_hides_it"]
        head += f"{where:<34} {training['seconds']:>8.1f} s = compute {training['compute_seconds']:.1f}"
        head += f" + bubble {training['bubble_seconds']:.1f} + " + ", ".join(f"{a} {s:.1f}" for a, s in axes.items())
        head += f"; {memory / GIB:.0f} GiB"
    if rollout is None:
        return head + "; no server holds it"
    shown = f"decode {rollout['decode']:.0f} + tail {rollout['tail']:.0f} + prefill {rollout['prefill']:.0f}"
    return head + f"; rollout on as many: {rollout['seconds']:.0f} s = {shown} + sync {rollout['sync']:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(prog="cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=NUMBER", help="another figure of the device")
    parser.add_argument("--out", type=Path, help="JSON to write")
    chosen = parser.parse_args(arguments)
    device = DEVICES[chosen.device]
    numbers = {field.name for field in fields(Device)} - {"name"}
    for name, _, value in (setting.partition("=") for setting in chosen.set):
        if name not in numbers:
            parser.error(f"--set {name}: a device has {', '.join(sorted(numbers))}")
        device = replace(device, **{name: int(value) if name == "cards_of_node" else float(value)})
    figures = {field.name: getattr(device, field.name) for field in fields(Device)}
    print(f"COMPUTED, not measured, from {figures}")
    print(f"a step: {STEP_ROWS} rows of {ROW_TOKENS:,} tokens; {SEQUENCES:,} responses of {MEAN_TOKENS:,} on average")
    report = {"benchmark": "cost", "measured": False, "device_figures": figures, "lines": []}
    for name, gpus in itertools.product(chosen.models, chosen.gpus):
        report["lines"].append(report_of(name, gpus, device))
        print(line_of(report["lines"][-1]), flush=True)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
