"""What bounds the CUDA row kernels, by counting their machine code: nothing is run, and no speed is measured.

    python tools/benchmark/row_kernel_model.py [--cuda-bin FOLDER] [--columns 151936] [--out FILE]

Compiles csrc/ for sm_90a, sm_100f and sm_120 with nvcc, for the last two without and with KLEAR_PAIRS: the code that
sm_100 and its family have of their own, and that sm_120 has not because it gains nothing. Takes the loops over a row
from cuobjdump's listing and counts, for an element of the row, bytes of device memory, exponentials (MUFU), fp32
operations and issue slots. Of each loop that path is counted which full units of 16 bytes take: the masks of a row's
last unit are jumped over. On machines without CUDA, pip's nvidia-cuda-nvcc, -runtime, -crt, -cccl, -cuobjdump,
-nvdisasm and nvidia-nvvm bring what is needed.

A multiprocessor issues the instructions of 4 warps, does 128 fp32 operations and makes 16 exponentials in a clock; an
instruction of two fp32 operations takes one slot and counts as two of them. The share of copy bandwidth is that of a
kernel that reads and writes the same bytes once, and is a range. At its low end all phases come after each other, and
the second of two reads is from device memory; at its high end all that memory does not need is hidden behind it, and
the second read is from cache.

Of a sharded vocabulary the kernel that reads it once is counted for RANKS ranks, each with its part of the columns.
What a row's blocks wait for their peers is in neither end: it depends on how far the ranks are apart. What a row sends
through the mailboxes is counted in bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ISSUE_LANES, FMA_LANES, MUFU_LANES = 128, 128, 16  # a clock and multiprocessor
RANKS = 2  # of a sharded vocabulary
POST_BYTES, ENTRY_BYTES = 20, 32  # of a row's statistics and number to one peer, and of their place in a mailbox
COPY_EFFICIENCY = 0.92  # of the peak bandwidth that a copy reaches
NAMES = {"one_read": "one read", "two_read": "two reads", "sharded": "sharded"}
TYPES = {"f": ("fp32", 4), "NS_4bf16E": ("bf16", 2)}
Code = list[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak bytes a second of device memory, multiprocessors, their clock under load, and what code is theirs."""

    name: str
    architecture: str
    bandwidth: float
    multiprocessors: int
    hertz: float

    def clocks(self, size: float) -> float:
        """Clocks in which one multiprocessor's part of the copy bandwidth moves `size` bytes."""
        return size * self.multiprocessors * self.hertz / (COPY_EFFICIENCY * self.bandwidth)


GPUS = (
    Gpu("H100 SXM", "90a", 3.35e12, 132, 1.755e9),
    Gpu("H200 SXM", "90a", 4.8e12, 132, 1.755e9),
    Gpu("B200", "100f", 8e12, 148, 1.965e9),
    Gpu("RTX PRO 6000", "120", 1.79e12, 188, 2.6e9),
)
CODES = (("90a", False), ("100f", False), ("100f", True), ("120", False), ("120", True))
"""Architectures, and whether with the code of sm_100 and its family."""


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop over a row, for an element of it."""

    name: str
    issue: float  # instructions of a thread
    fma: float  # additions, multiplications and both at once, of fp32
    mufu: float

    @property
    def units(self) -> dict[str, float]:
        """Clocks of a multiprocessor that each of its units takes."""
        return {
            "MUFU": self.mufu / MUFU_LANES,
            "issue": self.issue / ISSUE_LANES,
            "fp32": self.fma / FMA_LANES,
        }

    @property
    def clocks(self) -> float:
        """Clocks of a multiprocessor, by the unit that takes longest."""
        return max(self.units.values())


def functions(listing: str) -> Iterator[tuple[str, Code]]:
    """Mangled name and instructions of each function in a listing of cuobjdump -sass."""
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", body)
        yield name.strip(), [(int(address, 16), text) for address, text in found]


def loops(code: Code) -> list[list[str]]:
    """Of each innermost loop the path that makes all its exponentials in the fewest instructions."""
    index = {address: i for i, (address, _) in enumerate(code)}
    jumps = {i: index[to] for i, (_, text) in enumerate(code) if (to := _target(text)) in index}
    spans = [(to, i) for i, to in jumps.items() if to < i]
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [_path(code, jumps, first, last) for first, last in inner]


def _target(text: str) -> int | None:
    match = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def _path(code: Code, jumps: dict[int, int], first: int, last: int) -> list[str]:
    best: dict[int, tuple[int, int]] = {first: (0, 0)}  # exponentials left out, instructions
    came: dict[int, int] = {}
    for i in range(first, last):
        if i not in best:
            continue
        text = code[i][1]
        cost = (best[i][0] - text.count("MUFU.EX2"), best[i][1] + 1)
        falls = text.startswith("@") or not re.match(r"BRA|EXIT", text)
        for following in ([i + 1] if falls else []) + ([jumps[i]] if jumps.get(i, 0) > i else []):
            if following <= last and cost < best.get(following, (1, 0)):
                best[following], came[following] = cost, i
    path = [last]
    while path[-1] in came:
        path.append(came[path[-1]])
    return [code[i][1] for i in reversed(path)]


def row_loops(code: Code, size: int) -> list[Loop]:
    """The loops that load a row of elements of `size` bytes: maximum and sums, or statistics, and gradient.

    Of two loops of one name, whole units and the ragged rest, the cheaper is that of whole units.
    """
    found: dict[str, Loop] = {}
    for path in loops(code):
        units = sum(bool(re.search(r"\b(LDS|LDG\.E)\.128\b", text)) for text in path)
        exponentials = sum("MUFU.EX2" in text for text in path)
        stores = any(re.search(r"\bSTG\b", text) for text in path)
        largest = any(re.search(r"\b(FMNMX3?|V?HMNMX2?)\b", text) for text in path)
        operations = sum(_operations(text) for text in path)
        if units == 0 or not largest:
            continue
        in_shared = any("LDS.128" in text for text in path)
        name = "gradient" if stores else "maximum" if not exponentials else "sums" if in_shared else "statistics"
        elements = units * 16 // size
        loop = Loop(name, len(path) / elements, operations / elements, exponentials / elements)
        found[name] = min(loop, found.get(name, loop), key=lambda one: one.issue)
    return sorted(found.values(), key=lambda loop: ("maximum", "sums", "statistics", "gradient").index(loop.name))


def _operations(text: str) -> int:
    match = re.search(r"\b(?:FFMA|FADD|FMUL)(2?)\b", text)
    return (2 if match[1] else 1) if match else 0


def kernels(listing: str, columns: int) -> Iterator[tuple[str, str, int, int, Code]]:
    """Kernel, its types, their bytes, and code of those that make one pass over rows of `columns`."""
    pattern = r"(one_read|two_read|sharded)_rowsI(f|NS_4bf16E)(f|NS_4bf16E|S\d_)Li(\d)E"
    for name, code in functions(listing):
        match = re.search(pattern, name)
        if not match:
            continue
        kernel, source, target, number = match.groups()
        target = source if target.startswith("S") else target
        (from_name, size), (to_name, to_size) = TYPES[source], TYPES[target]
        part, block = (-(-columns // RANKS), 76032) if kernel == "sharded" else (columns, 76288)
        cluster = next((c for c in (1, 2, 4) if part * size <= c * block), 8)
        if int(number) == (0 if kernel == "two_read" else cluster):
            yield NAMES[kernel], f"{from_name} to {to_name}", size, to_size, code


def mailbox_bytes(size: int, to_size: int, columns: int) -> dict[str, float]:
    """Of a row on one rank: bytes sent to the peers, of its mailbox that is written, and the share of the row's own."""
    own = -(-columns // RANKS) * (size + to_size)
    sent = POST_BYTES * (RANKS - 1)
    return {"ranks": RANKS, "sent": sent, "mailbox": ENTRY_BYTES * RANKS, "of_row": float(f"{sent / own:.1e}")}


def estimate(kernel: str, size: int, to_size: int, found: list[Loop], gpu: Gpu) -> dict[str, object]:
    """Clocks of an element in memory and arithmetic, what bounds it, and the share of copy bandwidth."""
    copy = gpu.clocks(size + to_size)
    memory = gpu.clocks(size * (2 if kernel == "two reads" else 1) + to_size)
    arithmetic = sum(loop.clocks for loop in found)
    heaviest = max(found, key=lambda loop: loop.clocks)
    unit = max(heaviest.units, key=lambda name: heaviest.units[name])
    return {
        "gpu": gpu.name,
        "memory_clocks": round(memory, 3),
        "arithmetic_clocks": round(arithmetic, 3),
        "bound": "memory" if memory > arithmetic else f"{unit} of the {heaviest.name}",
        "copy_share": [round(copy / (memory + arithmetic), 2), round(min(1.0, copy / max(copy, arithmetic)), 2)],
    }


def listing(cuda_bin: str, architecture: str, pairs: bool) -> str:
    """cuobjdump's listing of the row kernels, compiled for an architecture."""
    path = os.pathsep.join(filter(None, (cuda_bin, os.environ.get("PATH", ""))))
    if missing := [tool for tool in ("nvcc", "cuobjdump", "nvdisasm") if not shutil.which(tool, path=path)]:
        raise SystemExit(f"needs {' and '.join(missing)}: on the PATH, or name their folder in --cuda-bin (see --help)")
    texts = []
    for name in ("cuda_one_read", "cuda_two_read", "cuda_sharded"):
        with tempfile.TemporaryDirectory() as folder:
            made = f"{folder}/{name}.cubin"
            arch = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}", f"-DKLEAR_PAIRS={int(pairs)}"]
            command = ["nvcc", "-O3", "-std=c++17", *arch, "-cubin", "-o", made, str(ROOT / "csrc" / f"{name}.cu")]
            subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            done = ["cuobjdump", "-sass", made]
            texts.append(subprocess.check_output(done, text=True, env={**os.environ, "PATH": path}))
    return "".join(texts)


def counted(text: str, architecture: str, pairs: bool, columns: int) -> Iterator[dict[str, Any]]:
    """What is written of each kernel of a listing."""
    for kernel, types, size, to_size, code in kernels(text, columns):
        found = row_loops(code, size)
        posts = {"mailboxes": mailbox_bytes(size, to_size, columns)} if kernel == "sharded" else {}
        yield {
            "architecture": f"sm_{architecture}",
            "pairs": pairs,
            "kernel": kernel,
            "types": types,
            "loops": [asdict(loop) for loop in found],
            "estimates": [
                estimate(kernel, size, to_size, found, gpu) for gpu in GPUS if gpu.architecture == architecture
            ],
            **posts,
        }


def main() -> None:
    """Count, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cuda-bin", default="", help="folder of nvcc, cuobjdump and nvdisasm, before those on the PATH"
    )
    parser.add_argument("--columns", type=int, default=151_936, help="width of the rows")
    parser.add_argument("--out", type=Path, default=ROOT / "tools/benchmark/results/row_kernel_model.json")
    options = parser.parse_args()
    rows = []
    for architecture, pairs in CODES:
        for row in counted(listing(options.cuda_bin, architecture, pairs), architecture, pairs, options.columns):
            rows.append(row)
            counts = " + ".join(f"{loop['issue']:.2f}/{loop['fma']:.2f}/{loop['mufu']:.2f}" for loop in row["loops"])
            for answer in row["estimates"]:
                code = f"{row['architecture']:7} {'newer' if pairs else 'older'}"
                print(f"{code} {row['kernel']:9} {row['types']:12} {counts} (issue/fp32/MUFU) {answer}")
    report = {"computed": "from machine code; nothing was run", "columns": options.columns, "kernels": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
