"""Measure curation: the scan of decontamination, its command and its memory, near duplicates found, K-Center-Greedy.

    python tools/benchmark/curation.py
    python tools/benchmark/curation.py --documents 100000 --rows 1500000

Documents have a median of 40 words, log-normal, drawn by rank from 20,000 made-up words with punctuation between; the
benchmark's 800 items have 60 of the same words each, so that most windows have to be hashed. One document in 100
holds nine words of an item. The baseline is the plain way over the same documents: tuples of nine words, looked up in
a set; both must flag the same documents. The command reads, checks and writes JSONL in one process, on `--rows` rows,
the documents over and over with a number in front, and on a quarter of them: its peak memory must not grow with them.

Near duplicates are the documents of at least ten words with one to four words replaced, left out or put in, given after
the originals. Recall is the share of those at a Jaccard similarity of 0.7 and more, computed the plain way, that is
dropped; precision is the share of the dropped that are. The command's memory grows by what is told a document.

Targets: 25,000 documents a CPU-second of the scan, at most 1 GB and no growth for the command, recall 0.9, precision 1.
CPU-seconds are those of a process: other work on the machine changes them little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

from megatron_klear.config.base import Settings
from megatron_klear.curation.decontaminate import DecontaminateSettings, run_decontaminate
from megatron_klear.curation.deduplicate import DeduplicateSettings, run_deduplicate
from megatron_klear.curation.grams import GRAM_WORDS, Item, build_index
from megatron_klear.curation.run import Files
from megatron_klear.curation.select import SelectSettings, run_select
from megatron_klear.curation.text import words
from tools.benchmark.device import cpu_name

VOCABULARY, ITEMS, ITEM_WORDS, MEDIAN_WORDS, SIGMA = 20_000, 800, 60, 40, 0.6
BATCH, MOST_GROWTH_MIB, MOST_MIB, TARGET, RECALL = 512, 32, 1000, 25_000, 0.9
JACCARD, CHOSEN = 0.7, 500
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


def near_duplicates(documents: list[str], folder: Path) -> dict[str, Any]:
    """What `deduplicate --near` finds of edited copies, and what that costs."""
    chosen = random.Random(1)
    originals = list(dict.fromkeys(document for document in documents if len(document.split()) >= 10))
    copies = [_edited(document, chosen) for document in originals]
    first, second = _write(folder / "originals.jsonl", originals), _write(folder / "copies.jsonl", copies)
    few = _write(folder / "few.jsonl", originals[: len(originals) // 4])
    settings = DeduplicateSettings(near=True, min_jaccard=JACCARD)
    _, few_mib = in_a_process(run_deduplicate, Files([few], folder / "few_originals" / "rows.jsonl"), settings)
    seconds, mib = in_a_process(run_deduplicate, Files([first], folder / "alone" / "rows.jsonl"), settings)
    in_a_process(run_deduplicate, Files([first, second], folder / "both" / "rows.jsonl"), settings)
    with (folder / "both" / "rows.jsonl").open() as lines:
        kept = {json.loads(line)["prompt"] for line in lines}
    pairs = list(zip(originals, copies, strict=True))
    near = {copy for original, copy in pairs if _jaccard(original, copy) >= JACCARD}
    gone = {copy for copy in copies if copy not in kept}
    return {
        "near_documents": len(originals),
        "near_planted": len(near),
        "near_recall": round(len(gone & near) / len(near), 4),
        "near_precision": round(len(gone & near) / len(gone), 4),
        "near_documents_per_cpu_second": round(len(originals) / seconds),
        "near_kib_a_document": round((mib - few_mib) * 1024 / (0.75 * len(originals)), 1),
    }


def _edited(document: str, chosen: random.Random) -> str:
    words_ = document.split()
    for _ in range(chosen.randint(1, 4)):
        place, kind = chosen.randrange(len(words_)), chosen.randrange(3)
        words_[place : place + (kind < 2)] = [f"new{chosen.randrange(1000)}"] if kind else []
    return " ".join(words_)


def _jaccard(one: str, other: str) -> float:
    """Of the sets of five words in a row, the plain way."""
    sets = [
        {tuple(tokens[k : k + 5]) for k in range(max(1, len(tokens) - 4))}
        for tokens in (text.lower().split() for text in (one, other))
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def in_a_process(run: Callable[[Files, Any], Any], files: Files, settings: Settings) -> Result:
    """A whole verb, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (run, files.inputs, files.output, settings))


def _measured(run: Callable[[Files, Any], Any], inputs: list[Path], output: Path, settings: Settings) -> Result:
    start = time.process_time()
    run(Files(inputs, output), settings)
    seconds = time.process_time() - start
    # Not ru_maxrss, which a process inherits from the larger one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    return seconds, peak >> 10


def _grams(tokens: list[str]) -> list[tuple[str, ...]]:
    return [tuple(tokens[k : k + GRAM_WORDS]) for k in range(len(tokens) - GRAM_WORDS + 1)]


def _write(path: Path, texts: Iterable[str], key: str = "prompt") -> Path:
    rest = {"data_source": "made_up", "reward_model": {"ground_truth": "1"}} if key == "prompt" else {}
    with path.open("w") as stream:
        stream.writelines(json.dumps({key: text, **rest}) + "\n" for text in texts)
    return path


def whole_command(items: list[str], documents: list[str], rows: int, folder: Path) -> dict[str, Any]:
    """Decontamination from files to files on `rows` rows and on a quarter of them."""
    settings = DecontaminateSettings(against=(str(_write(folder / "items.jsonl", items, "problem")),))
    found = {}
    for name, count in (("few", rows // 4), ("all", rows)):
        file = _write(folder / f"{name}.jsonl", (f"{k} {documents[k % len(documents)]}" for k in range(count)))
        found[name] = in_a_process(run_decontaminate, Files([file], folder / name / "rows.jsonl"), settings)
        file.unlink()
    return {
        "command_rows": rows,
        "command_rows_per_cpu_second": round(rows / found["all"][0]),
        "command_peak_mib": found["all"][1],
        "command_peak_mib_of_a_quarter": found["few"][1],
    }


def main() -> int:
    """Run, print, write JSON where --out asks for it; exit code 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--rows", type=int, help="of the whole command; as many as documents unless given")
    parser.add_argument("--out", type=Path, help="JSON file for the results; none is written unless named")
    options = parser.parse_args()
    items, documents = texts_of(options.documents, seed=0)
    plain_seconds, plainly = scan_plainly(items, documents)
    seconds, found = scan(items, documents)
    if found != plainly:
        print(f"the scan flags {len(found)} documents, the plain one {len(plainly)}: not the same", file=sys.stderr)
        return 1
    lengths = sorted(len(words(document)) for document in documents)
    results: dict[str, Any] = {
        "benchmark": "curation",
        "device": f"{cpu_name()}, one used",
        "load_before": round(os.getloadavg()[0], 2),
        "documents": len(documents),
        "median_words": lengths[len(lengths) // 2],
        "flagged": len(found),
        "scan_documents_per_cpu_second": round(len(documents) / seconds),
        "plain_documents_per_cpu_second": round(len(documents) / plain_seconds),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results |= whole_command(items, documents, options.rows or len(documents), folder)
        results |= near_duplicates(documents, folder)
        settings = SelectSettings(total=min(CHOSEN, len(documents)), method="k_center")
        rows = _write(folder / "rows.jsonl", documents)
        spent, _ = in_a_process(run_select, Files([rows], folder / "selected" / "rows.jsonl"), settings)
        results |= {"k_center_chosen": settings.total, "k_center_cpu_seconds": round(spent, 2)}
    print(json.dumps(results, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    met = {
        f"{TARGET} documents a CPU-second": len(documents) / seconds >= TARGET,
        f"at most {MOST_MIB} MiB": results["command_peak_mib"] <= MOST_MIB,
        "memory that does not grow": results["command_peak_mib"] - results["command_peak_mib_of_a_quarter"]
        <= MOST_GROWTH_MIB,
        f"recall {RECALL}, precision 1": results["near_recall"] >= RECALL and results["near_precision"] == 1,
    }
    for what, holds in met.items():
        print(f"{what}: {'met' if holds else 'MISSED'}")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
