"""Run the layouts that a model and a machine can take, and say of each how far it is from the reference.

By itself it starts as many processes as each layout takes. Under torchrun it uses those that are there: layouts whose
model size divides the world run with data parallelism over the rest, and the first of them is the reference.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.checks import check_layout
from megatron_klear.errors import UserError
from megatron_klear.mcore.processes import Processes
from megatron_klear.mcore.topology import process_group
from megatron_klear.models.architecture import Architecture
from megatron_klear.types import Sample
from megatron_klear.verify.layouts import Comparison, Layout, LayoutResult, LossName, compare, layouts_of, measure

Fused = Literal["config", "both"]

TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3}
"""Of the loss and the gradient norm, relative; log-probs get ten times that, in nats. Layouts sum in different orders,
which moves fp32 results by parts in a million. In bf16 a sum over tensor ranks rounds to 8 bits once a layer, and the
steps amplify it; docs/verify.md has what was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutRow:
    """A layout's place in the table; without a comparison, `reason` says why it was not run."""

    name: str
    processes: int
    comparison: Comparison | None = None
    reason: str = ""
    passed: bool | None = None
    """None for the reference and for what was not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutReport:
    """All layouts, the reference first among those that ran."""

    rows: tuple[LayoutRow, ...]
    reference: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """No layout is outside of the tolerance, and at least one was compared with the reference."""
        return all(row.passed is not False for row in self.rows) and any(row.passed for row in self.rows)


def verify_layouts(
    config: SFTConfig,
    architecture: Architecture,
    samples: Sequence[Sample],
    *,
    steps: int,
    loss: LossName,
    fused: Fused,
    tolerance: float,
    most_processes: int,
    told: Callable[[str], None] = print,
) -> LayoutReport:
    """Compare every layout with the first that is possible. Collective where torchrun started several processes.

    Raises UserError where fewer than two layouts are possible.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    rows: list[LayoutRow] = []
    reference: LayoutResult | None = None
    reference_name = ""
    with _processes_of(config, started):
        for layout, reason in plan_layouts(config, architecture, fused, most_processes, started):
            if reason:
                rows.append(LayoutRow(name=layout.name, processes=layout.processes, reason=reason))
                continue
            told(f"running {layout.name} on {layout.processes} processes")
            result = _run(config, layout, samples, steps, loss, started)
            if reference is None:
                reference, reference_name = result, layout.name
                rows.append(LayoutRow(name=layout.name, processes=layout.processes, reason="reference"))
                continue
            found = compare(result, reference, samples)
            rows.append(
                LayoutRow(
                    name=layout.name,
                    processes=layout.processes,
                    comparison=found,
                    passed=found.within(tolerance),
                )
            )
    if not any(row.comparison for row in rows):
        raise UserError("there is nothing to compare: " + "; ".join(f"{row.name}: {row.reason}" for row in rows))
    return LayoutReport(rows=tuple(rows), reference=reference_name, tolerance=tolerance)


def plan_layouts(
    config: SFTConfig, architecture: Architecture, fused: Fused, most_processes: int, started: int = 1
) -> Iterator[tuple[Layout, str]]:
    """Every layout with the reason for which it is not possible, empty where it is."""
    seen = set()
    for listed in layouts_of(architecture):
        layout = listed if started == 1 else _filling(listed, started)
        identity = dataclasses.replace(layout, name="")
        if identity in seen:
            continue
        seen.add(identity)
        reason = _obstacle(config, architecture, layout, most_processes, started)
        for variant in _variants(layout, fused, config.model.fused_loss):
            yield variant, reason


def _variants(layout: Layout, fused: Fused, configured: bool) -> list[Layout]:
    """With `both`, the loss as configured first, so that it is the reference, then the other way."""
    if fused == "config":
        return [layout]
    return [
        dataclasses.replace(layout, fused=on, name=f"{layout.name}, {'fused' if on else 'unfused'} loss")
        for on in (configured, not configured)
    ]


def _filling(layout: Layout, started: int) -> Layout:
    """The layout with data parallelism over the processes that are there, where it divides them."""
    replica = layout.processes // layout.data
    if started % replica:
        return layout
    data = started // replica
    plain = layout.name.replace(" DP2", "").replace("DP2 ", "").replace("DP2", "").replace("one process", "")
    name = f"{plain}, DP{data}".lstrip(", ") if data > 1 else (plain or "one replica")
    return dataclasses.replace(layout, data=data, name=name)


def _obstacle(config: SFTConfig, architecture: Architecture, layout: Layout, most_processes: int, started: int) -> str:
    if started > 1 and layout.processes != started:
        return f"{layout.processes} processes a replica do not divide the {started} that torchrun started"
    if started == 1 and layout.processes > most_processes:
        return f"takes {layout.processes} processes, at most {most_processes} may be used (--processes)"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if started == 1 and gpus is not None and layout.processes > gpus:
        return f"takes {layout.processes} GPUs, {gpus} are visible"
    return "; ".join(check_layout(layout.lay_out(config), architecture, layout.processes))


@contextmanager
def _processes_of(config: SFTConfig, started: int) -> Iterator[None]:
    """Keep torchrun's process group over all layouts."""
    if started == 1:
        yield
        return
    with process_group(config.parallel):
        yield


def _run(
    config: SFTConfig, layout: Layout, samples: Sequence[Sample], steps: int, loss: LossName, started: int
) -> LayoutResult:
    if started > 1:
        return measure(config, layout, samples, steps, loss)
    # Always in processes of their own, so that this one holds no GPU memory.
    with Processes(layout.processes, measure, config, layout, samples, steps, loss) as processes:
        results = processes.results()
    assert results is not None
    first: LayoutResult = results[0]
    return first
