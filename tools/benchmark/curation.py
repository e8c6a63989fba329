"""Measure decontamination: documents a CPU-second of the scan and of the whole command, and peak memory.

    python tools/benchmark/curation.py
    python tools/benchmark/curation.py --documents 400000

Documents have a median of 40 words, log-normal, drawn by rank from 20,000 made-up words with punctuation between; the
benchmark's 800 items have 60 of the same words each, so that most windows have to be hashed. One document in 100
holds nine words of an item. The baseline is the plain way over the same documents: tuples of nine words, looked up in
a set; both must flag the same documents. The command reads, checks and writes JSONL in one process, on the documents
and on a quarter of them: its peak memory must not grow with them. Target: 25,000 documents a CPU-second of the scan.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

from megatron_klear.curation.decontaminate import DecontaminateSettings, run_decontaminate
from megatron_klear.curation.grams import GRAM_WORDS, Item, build_index
from megatron_klear.curation.run import Files
from megatron_klear.curation.text import words
from tools.benchmark.device import cpu_name

VOCABULARY, ITEMS, ITEM_WORDS, MEDIAN_WORDS, SIGMA = 20_000, 800, 60, 40, 0.6
BATCH, MOST_GROWTH_MIB, TARGET = 512, 32, 25_000
Result = tuple[float, int]
"""CPU-seconds, and MiB of peak memory."""


def texts_of(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Items of a benchmark, and documents, every hundredth of which holds nine words of an item."""
    chosen = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(chosen.choices(letters, k=chosen.randint(1, 9))) for _ in range(VOCABULARY)]
    ranks = list(accumulate(1 / rank for rank in range(1, VOCABULARY + 1)))

    def text(length: int) -> str:
        drawn = chosen.choices(vocabulary, cum_weights=ranks, k=length)
        return "".join(word + (", $" if chosen.random() < 0.1 else " ") for word in drawn).capitalize()

    items = [text(ITEM_WORDS) for _ in range(ITEMS)]
    documents = []
    for number in range(count):
        document = text(max(1, round(MEDIAN_WORDS * 2.718281828 ** chosen.gauss(0, SIGMA))))
        if number % 100 == 0:
            document += " " + " ".join(chosen.choice(items).split()[5 : 5 + GRAM_WORDS])
        documents.append(document)
    return items, documents


def scan(items: list[str], documents: list[str]) -> tuple[float, set[int]]:
    """CPU-seconds of the scan, and the documents that share a gram."""
    index = build_index([Item({"file": "items", "row": k}, (tuple(words(item)),)) for k, item in enumerate(items, 1)])
    start, found = time.process_time(), set()
    for first in range(0, len(documents), BATCH):
        found.update(first + number for number in index.scan(documents[first : first + BATCH]))
    return time.process_time() - start, found


def scan_plainly(items: list[str], documents: list[str]) -> tuple[float, set[int]]:
    """The same with a set of tuples."""
    grams = {gram for item in items for gram in _grams(words(item))}
    start = time.process_time()
    found = {number for number, document in enumerate(documents) if not grams.isdisjoint(_grams(words(document)))}
    return time.process_time() - start, found


def command(documents: Path, items: Path, output: Path) -> Result:
    """The whole command, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_command, (documents, items, output))


def _command(documents: Path, items: Path, output: Path) -> Result:
    start = time.process_time()
    run_decontaminate(Files([documents], output), DecontaminateSettings(against=(str(items),)))
    seconds = time.process_time() - start
    # Not ru_maxrss, which a process inherits from the larger one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    return seconds, peak >> 10


def _grams(tokens: list[str]) -> list[tuple[str, ...]]:
    return [tuple(tokens[k : k + GRAM_WORDS]) for k in range(len(tokens) - GRAM_WORDS + 1)]


def _write(path: Path, texts: list[str], key: str) -> Path:
    rest = {"data_source": "made_up", "reward_model": {"ground_truth": "1"}} if key == "prompt" else {}
    path.write_text("".join(json.dumps({key: text, **rest}) + "\n" for text in texts))
    return path


def main() -> int:
    """Run, print, write JSON where --out asks for it; exit code 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="JSON file for the results; none is written unless named")
    options = parser.parse_args()
    items, documents = texts_of(options.documents, seed=0)
    plain_seconds, plainly = scan_plainly(items, documents)
    seconds, found = scan(items, documents)
    if found != plainly:
        print(f"the scan flags {len(found)} documents, the plain one {len(plainly)}: not the same", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = _write(folder / "items.jsonl", items, "problem")
        few = _write(folder / "few.jsonl", documents[: len(documents) // 4], "prompt")
        rows = _write(folder / "rows.jsonl", documents, "prompt")
        _, few_mib = command(few, bench, folder / "few" / "rows.jsonl")
        whole_seconds, whole_mib = command(rows, bench, folder / "all" / "rows.jsonl")
    lengths = sorted(len(words(document)) for document in documents)
    results = {
        "benchmark": "curation",
        "device": f"{cpu_name()}, one used",
        "documents": len(documents),
        "median_words": lengths[len(lengths) // 2],
        "flagged": len(found),
        "scan_documents_per_cpu_second": round(len(documents) / seconds),
        "plain_documents_per_cpu_second": round(len(documents) / plain_seconds),
        "command_documents_per_cpu_second": round(len(documents) / whole_seconds),
        "command_peak_mib": whole_mib,
        "command_peak_mib_of_a_quarter": few_mib,
    }
    print(json.dumps(results, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    met = len(documents) / seconds >= TARGET and whole_mib - few_mib <= MOST_GROWTH_MIB
    print(f"{TARGET} documents a CPU-second, memory that does not grow:", "met" if met else "MISSED")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
