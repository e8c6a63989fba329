"""Print, and plot, the gradient weight of chosen losses over the importance ratio and the sign of the advantage.

    klear losses                                   every loss of the family
    klear losses gppo:dual_clip=10 ppo:clip_high=0.28 cispo --plot losses.png
    klear losses my.module:MyLoss

The gradient weight F is what multiplies the advantage in the policy gradient, d loss / d logp = -F A. Losses over whole
responses or updates (gspo, gmpo, clip_cov, kl_cov) are shown for a response of one token, alone in its update: what
kl_cov has for a token that it penalises, clip_cov for one that it leaves in.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from megatron_klear.rl.batch_losses import Alone
from megatron_klear.rl.losses import LOSSES, AnyLoss, BatchLoss, SequenceLoss, resolve_loss
from megatron_klear.types import PackedBatch

RATIOS = (0.01, 0.3, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0, 4.0, 9.9, 10.1, 20.0)
DEFAULT = (
    "ppo:clip_high=0.28",
    "gppo",
    "gppo:dual_clip=10",
    "gppo:beta_low=0.5",
    "cispo",
    "capped_cispo",
    "reinforce",
    "sapo",
    "dppo",
    "dppo:divergence='kl',bound_low=0.05,bound_high=0.05",
    "gspo",
    "gmpo",
    "clip_cov",
    "kl_cov",
)


def parse(text: str) -> AnyLoss:
    """The loss that `name:key=value,key=value` stands for; the name may be a dotted path, `module:Name`."""
    parts = text.split(":")
    name = parts[0] if parts[0] in LOSSES or len(parts) == 1 else ":".join(parts[:2])
    settings = text[len(name) + 1 :]
    arguments: dict[str, Any] = {}
    for item in filter(None, settings.split(",")):
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"{text!r}: {item!r} must be key=value")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{text!r}: the value of {key} must be a number, not {value!r}") from error
    try:
        return resolve_loss(name, arguments)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error


def gradient_weights(loss: AnyLoss, ratios: torch.Tensor, advantage: float) -> torch.Tensor:
    """F at each importance ratio, for advantage +1 or -1, by differentiating the loss at log-probs of -1."""
    logprobs = torch.full_like(ratios, -1.0).requires_grad_()
    advantages = torch.full_like(ratios, advantage)
    old: torch.Tensor = logprobs.detach() - ratios.log()
    of_advantage = advantages
    token_loss = loss.token_loss() if isinstance(loss, SequenceLoss | BatchLoss) else loss
    if isinstance(loss, BatchLoss):
        rows = [_alone(*token) for token in zip(old, advantages, strict=True)]
        rewritten = [loss.rewrite([row], [logprobs.detach()[:1]], Alone(), salt=0)[0] for row in rows]
        old = torch.cat([cast(torch.Tensor, row.old_logprobs) for row in rewritten])
        of_advantage = torch.cat([cast(torch.Tensor, row.advantages) for row in rewritten])
    values = token_loss(logprobs, old, of_advantage)
    (slope,) = torch.autograd.grad(values.sum(), logprobs)
    return -slope / advantage


def _alone(old: torch.Tensor, advantage: torch.Tensor) -> PackedBatch:
    """A row of one trained token."""
    return PackedBatch(
        tokens=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        weights=torch.ones(1),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        advantages=advantage[None],
        old_logprobs=old[None],
        sample_numbers=(0,),
    )


def print_table(losses: dict[str, AnyLoss], console: Console) -> None:
    """One row a ratio, two columns a loss."""
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    table = Table(title="gradient weight F,  d loss / d logp = -F A", title_justify="left")
    table.add_column("ratio", justify="right")
    columns = []
    for name, loss in losses.items():
        for sign, advantage in (("A > 0", 1.0), ("A < 0", -1.0)):
            table.add_column(f"{name}\n{sign}", justify="right")
            columns.append(gradient_weights(loss, ratios, advantage))
    for index, ratio in enumerate(RATIOS):
        table.add_row(f"{ratio:g}", *(f"{column[index].item() + 0.0:.4g}" for column in columns))
    console.print(table)


def plot(losses: dict[str, AnyLoss], path: Path) -> None:
    """Two panels, one a sign of the advantage, F against the ratio on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = torch.logspace(-1, 1.2, 1000, dtype=torch.float64)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, (title, advantage) in zip(panels, (("A > 0", 1.0), ("A < 0", -1.0)), strict=True):
        for index, (name, loss) in enumerate(losses.items()):
            weights = gradient_weights(loss, ratios, advantage)
            panel.plot(ratios, weights, label=name, linewidth=1.8, linestyle=("-", "--", "-.", ":")[index % 4])
        panel.set(title=title, xlabel="importance ratio", xscale="log", ylim=(-0.1, 4))
        panel.axvline(1, color="0.8", linewidth=0.8, zorder=0)
    panels[0].set_ylabel("gradient weight F")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", nargs="*", default=DEFAULT, help=f"of {', '.join(LOSSES)}, or module:Name")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the curves to this file")
    parsed = parser.parse_args(arguments)
    sys.path.insert(0, str(Path.cwd()))
    try:
        losses = {text: parse(text) for text in parsed.losses}
    except ValueError as error:
        parser.error(str(error))
    print_table(losses, Console(width=None if sys.stdout.isatty() else 40 + 30 * len(losses)))
    if parsed.plot:
        plot(losses, parsed.plot)
        print(f"wrote {parsed.plot}")
    return 0
