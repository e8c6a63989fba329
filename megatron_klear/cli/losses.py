"""Print, and plot, the gradient weight of chosen losses over the importance ratio and the sign of the advantage.

    klear losses                                   every loss of the family
    klear losses gppo:dual_clip=10 ppo:clip_high=0.28 cispo --plot losses.png
    klear losses my.module:MyLoss

The gradient weight F is what multiplies the advantage in the policy gradient, d loss / d logp = -F A.
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

from megatron_klear.rl.losses import LOSSES, resolve_loss
from megatron_klear.types import TokenLoss

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
)


def parse(text: str) -> TokenLoss:
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
        loss = resolve_loss(name, arguments)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    if not callable(loss) or hasattr(loss, "token_loss"):
        loss = cast(Any, loss).token_loss()
    return cast(TokenLoss, loss)


def gradient_weights(loss: TokenLoss, ratios: torch.Tensor, advantage: float) -> torch.Tensor:
    """F at each importance ratio, for advantage +1 or -1, by differentiating the loss at log-probs of -1."""
    logprobs = torch.full_like(ratios, -1.0).requires_grad_()
    advantages = torch.full_like(ratios, advantage)
    values = loss(logprobs, logprobs.detach() - ratios.log(), advantages)
    (slope,) = torch.autograd.grad(values.sum(), logprobs)
    return -slope / advantage


def print_table(losses: dict[str, TokenLoss], console: Console) -> None:
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


def plot(losses: dict[str, TokenLoss], path: Path) -> None:
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
