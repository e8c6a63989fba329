"""The figures of a GPU suite beside their goals: one table in Markdown, from the files that the suite left.

    python tools/benchmark/gpu_table.py build/gpu_suite/NVIDIA_H100-123

A figure that a step did not leave is "not run", a goal that none was set for "-". The exit code is 0: what failed is
for the suite to count.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_RUN = "not run"
MEMORY_GOAL = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the table."""

    what: str
    figure: str
    goal: str = "-"
    met: bool | None = None
    """None where nothing was asked, or nothing measured."""

    def markdown(self) -> str:
        """As a row of a Markdown table."""
        verdict = {None: "", True: "met", False: "**missed**"}[self.met]
        return f"| {self.what} | {self.figure} | {self.goal} | {verdict} |"


def rows(folder: Path) -> list[Row]:
    """All lines, in the order of the suite's steps."""
    return [*test_rows(folder), *loss_rows(folder), *sft_rows(folder), *rollout_rows(folder), *quickstart_rows(folder)]


def test_rows(folder: Path) -> Iterator[Row]:
    """Tests on the device, from junit's XML."""
    path = folder / "gpu_tests.xml"
    if not path.is_file():
        yield Row(what="tests marked gpu", figure=NOT_RUN, goal="all pass")
        return
    suites = ElementTree.parse(path).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, "0"))
    bad, ran = counts["failures"] + counts["errors"], counts["tests"] - counts["skipped"]
    figure = f"{ran - bad} of {ran} passed, {counts['skipped']} skipped"
    yield Row(what="tests marked gpu", figure=figure, goal="all pass", met=bad == 0 and ran > 0)


def loss_rows(folder: Path) -> Iterator[Row]:
    """The fused loss at every size beside its floor and whoever was there to compare, and the targets it judges."""
    for size in ("4k", "8k", "32k"):
        report = _report(folder / f"policy_loss_cuda_{size}.json")
        if report is None:
            yield Row(what=f"policy loss, {size} tokens", figure=NOT_RUN)
            continue
        for one in report["results"]:
            place = f"policy loss, {size}, from {one['start']}, {one['loss']} {one['dtype']}: {one['name']}"
            if one["failure"]:
                yield Row(what=place, figure=one["failure"][:60])
                continue
            figure = (
                f"{one['milliseconds']:.2f} ms, {one['ratio_to_floor']:.2f} x floor, {one['extra_gigabytes']:.2f} GB"
            )
            yield Row(what=place, figure=figure)
        for text, met in report["checks"].items():
            what, _, goal = text.rpartition(", ")
            yield Row(what=f"policy loss, {size}", figure=what, goal=goal, met=met)


def sft_rows(folder: Path) -> Iterator[Row]:
    """SFT steps: the engine's speed, memory against the plan, and its speed over plain loops."""
    found = sorted(folder.glob("sft_cuda_*.json"))
    if not found:
        yield Row(what="SFT step", figure=NOT_RUN)
    for path in found:
        report = _report(path)
        for case in [] if report is None else report["cases"]:
            engine = case["loops"]["engine"]
            if engine["failure"]:
                yield Row(what=f"SFT {case['case']}", figure=engine["failure"])
                continue
            share = f", MFU {engine['mfu']:.1%}" if engine["mfu"] else ""
            yield Row(what=f"SFT {case['case']}", figure=f"{engine['tokens_per_second']:,.0f} tokens/s{share}")
            for other, ratio in case["engine_speed_over"].items():
                asked = 1.0 if other == "padded" else 0.9
                what = f"SFT {case['case']}: speed over {other}"
                yield Row(what=what, figure=f"{ratio:.2f}", goal=f">= {asked}", met=ratio >= asked)
            if engine["peak_gib"] and case.get("planned_gib"):
                off = case["planned_gib"] / engine["peak_gib"] - 1
                figure = f"{case['planned_gib']:.1f} planned, {engine['peak_gib']:.1f} GiB measured"
                what = f"SFT {case['case']}: memory"
                yield Row(what=what, figure=figure, goal=f"within {MEMORY_GOAL:.0%}", met=abs(off) <= MEMORY_GOAL)


def rollout_rows(folder: Path) -> Iterator[Row]:
    """Rollouts of each engine and the time of a weight sync."""
    report = _report(folder / "rollouts_cuda.json")
    if report is None:
        yield Row(what="rollouts", figure=NOT_RUN)
        return
    for name, engine in report["engines"].items():
        sync = f", weight sync {engine['sync_seconds']:.2f} s" if engine["sync_seconds"] else ""
        yield Row(what=f"rollouts: {name}", figure=f"{engine['tokens_per_second']:,.0f} tokens/s{sync}")


def quickstart_rows(folder: Path) -> Iterator[Row]:
    """The quickstart on the device: GPPO gains on held-out problems."""
    report = _report(folder / "quickstart_cuda.json")
    if report is None:
        yield Row(what="quickstart: SFT, then GPPO", figure=NOT_RUN, goal="GPPO gains")
        return
    before, after = report["accuracy_sft"], report["accuracy_gppo"]
    figure = f"{before:.1%} -> {after:.1%}, {report['seconds']:.0f} s"
    yield Row(what="quickstart: SFT, then GPPO", figure=figure, goal="GPPO gains", met=after > before)


def _report(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def _device(folder: Path) -> str:
    named = [report for path in sorted(folder.glob("*_cuda*.json")) if (report := _report(path)) and "device" in report]
    return str(named[0]["device"]) if named else "no benchmark has run"


def main() -> None:
    """Print the table."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(f"usage: {sys.argv[0]} FOLDER, which the GPU suite has written to")
    folder = Path(sys.argv[1])
    print(f"Device: {_device(folder)}\n\n| what | figure | goal | |\n| --- | --- | --- | --- |")
    print("\n".join(row.markdown() for row in rows(folder)))


if __name__ == "__main__":
    main()
