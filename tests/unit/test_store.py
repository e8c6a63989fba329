"""The token store: same samples whoever builds it and however often it was killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.config.base import DataConfig
from megatron_klear.data.arithmetic import arithmetic_rows
from megatron_klear.data.indexed import IndexedReader, IndexedWriter
from megatron_klear.data.rows import DataError, read_row
from megatron_klear.data.sources import read_chunks
from megatron_klear.data.store import TokenStore, open_store
from megatron_klear.data.tokenize_pool import TokenizeJob, mask_to_spans, tokenize
from megatron_klear.data.tokenizer import load_spec, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_tokenizer"


def write_jsonl(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", arithmetic_rows(50, seed=3))


def config_of(data: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"train": (str(data),), "cache": data.parent / "cache", **changes})


def contents(store: TokenStore) -> list[tuple[list[int], list[bool]]]:
    return [(sample.tokens.tolist(), sample.trained.tolist()) for sample in store]


def entries(cache: Path) -> list[str]:
    """Everything in a cache but locks and digests."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock" and path.name != "digests")


def test_store_holds_what_the_tokenizer_gives(data: Path) -> None:
    store, tokenizer = open_store(config_of(data), TINY), load_tokenizer(TINY)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(store) == len(rows) == store.summary.read == store.summary.rows.samples
    for index, (row, sample) in enumerate(zip(rows, store, strict=True)):
        expected = tokenizer.encode_row(read_row(row))
        assert np.array_equal(sample.tokens, expected.tokens)
        assert np.array_equal(sample.trained, expected.trained)
        assert store.lengths[index] == len(sample.tokens)
        assert store.trained_counts[index] == sample.trained.sum()
        assert store.origin(index) == f"{data}:{index + 1}"
    assert store.lengths.dtype == store.trained_counts.dtype == np.int32
    assert store.summary.rows.tokens == store.lengths.sum()
    with pytest.raises(IndexError):
        store[len(store)]


MEGATRON = """
import json, sys
import numpy as np, torch
from megatron_klear.mcore.device import install
install()
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
ours, copy = sys.argv[1:]
data, builder = IndexedDataset(ours), IndexedDatasetBuilder(copy + ".bin", dtype=np.int32)
for index in range(len(data)):
    assert data[index].dtype == np.int32
    builder.add_document(torch.from_numpy(data[index].copy()), [len(data[index])])
builder.finalize(copy + ".idx")
print(json.dumps([data.document_indices.tolist(), [data[index].tolist() for index in range(len(data))]]))
"""


def test_megatron_reads_the_same_tokens_and_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    """In a process of its own: Megatron on a CPU changes torch for the whole process."""
    store = open_store(config_of(data), TINY)
    ours, copy = store.folder / "rows", tmp_path / "copy"
    command = [sys.executable, "-c", MEGATRON, str(ours), str(copy)]
    output = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True).stdout
    documents, sequences = json.loads(output.splitlines()[-1])
    assert documents == list(range(len(store) + 1))
    assert sequences == [sample.tokens.tolist() for sample in store]
    for suffix in (".bin", ".idx"):
        assert ours.with_suffix(suffix).read_bytes() == copy.with_suffix(suffix).read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=9))
def test_indexed_files_round_trip(tmp_path_factory: pytest.TempPathFactory, sequences: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("indexed") / "tokens"
    with IndexedWriter(prefix) as writer:
        for sequence in sequences:
            writer.append(np.array(sequence, dtype=np.int32))
    reader = IndexedReader(prefix)
    assert [reader[index].tolist() for index in range(len(reader))] == sequences


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_cut_files_are_named(tmp_path: Path, suffix: str) -> None:
    with IndexedWriter(tmp_path / "tokens") as writer:
        writer.append(np.arange(5, dtype=np.int32))
    path = tmp_path / f"tokens{suffix}"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{path} .*cut short"):
        IndexedReader(tmp_path / "tokens")


@given(st.lists(st.booleans()))
def test_spans_spell_the_mask(mask: list[bool]) -> None:
    again = np.zeros(len(mask), dtype=np.bool_)
    spans = mask_to_spans(np.array(mask, dtype=np.bool_))
    for start, end in spans:
        assert start < end
        again[start:end] = True
    assert again.tolist() == mask
    assert all(after[0] > before[1] for before, after in pairwise(spans))


def test_processes_give_the_same_as_one(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", arithmetic_rows(1500, seed=i)) for i in range(2)]
    job = TokenizeJob(tokenizer=load_spec(TINY), turns="all", max_length=60, overlong="drop", held_out_share=0.3)

    def results(workers: int) -> list[Any]:
        chunks = (chunk for path in paths for chunk in read_chunks(path))
        return [
            (c.path, c.read, c.overlong, [(r.number, r.held_out, r.tokens.tolist(), r.spans.tolist()) for r in c.rows])
            for c in tokenize(chunks, job, workers)
        ]

    assert results(1) == results(3)


def test_workers_import_no_torch() -> None:
    check = (
        "import sys, megatron_klear.data.tokenize_pool\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], env=environment(), check=False).returncode == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_row_is_named_from_any_process(tmp_path: Path, workers: int) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*arithmetic_rows(1200), {"prompt": "q", "response": 3}])
    job = TokenizeJob(tokenizer=load_spec(TINY), turns="all", max_length=999, overlong="drop", held_out_share=0.0)
    with pytest.raises(DataError, match=r"rows\.jsonl:1201: `response` is of type int"):
        list(tokenize(read_chunks(path), job, workers))


def test_dead_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megatron_klear.data.tokenize_pool.__name__", "os"
    )  # the worker finds no `serve` there and ends
    path = write_jsonl(tmp_path / "rows.jsonl", arithmetic_rows(5))
    job = TokenizeJob(tokenizer=load_spec(TINY), turns="all", max_length=999, overlong="drop", held_out_share=0.0)
    with pytest.raises(RuntimeError, match=r"ended with exit code 1 at .*rows\.jsonl:1"):
        list(tokenize(read_chunks(path), job, 2))


@pytest.mark.parametrize("action", ["drop", "truncate", "error"])
def test_overlong_rows_are_counted(data: Path, action: str) -> None:
    full = open_store(config_of(data), TINY)
    limit = int(np.median(full.lengths))
    over = int((full.lengths > limit).sum())
    config = config_of(data, max_length=limit, overlong=action)
    if action == "error":
        first = int(np.argmax(full.lengths > limit)) + 1
        with pytest.raises(DataError, match=rf"rows\.jsonl:{first}: .* above data\.max_length {limit}"):
            open_store(config, TINY)
        assert len(entries(config.cache)) == 1, "a failed build leaves nothing"
        return
    store = open_store(config, TINY)
    assert store.summary.overlong == over > 0
    assert store.summary.longest == full.lengths.max()
    kept = [sample for sample in contents(full) if action == "truncate" or len(sample[0]) <= limit]
    assert contents(store) == [(tokens[:limit], trained[:limit]) for tokens, trained in kept]


def test_untrained_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*arithmetic_rows(3), {"messages": [{"role": "user", "content": "q"}]}, {"prompt": "q", "response": ""}]
    store = open_store(config_of(write_jsonl(tmp_path / "rows.jsonl", rows)), TINY)
    assert (len(store), store.summary.untrained, store.summary.read) == (3, 2, 5)
    assert "2 without a trained token" in str(store.summary)


def test_held_out_rows_follow_content_not_order(tmp_path: Path) -> None:
    rows = list(arithmetic_rows(400, seed=1))
    splits = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        config = config_of(write_jsonl(tmp_path / f"{name}.jsonl", ordered), validation_share=0.25)
        train, held_out = (contents(open_store(config, TINY, split)) for split in ("train", "validation"))
        assert len(train) + len(held_out) == len(rows)
        assert 60 < len(held_out) < 140
        splits.append((sorted(train), sorted(held_out)))
    assert splits[0] == splits[1]
    assert not {tuple(tokens) for tokens, _ in splits[0][0]} & {tuple(tokens) for tokens, _ in splits[0][1]}


def test_validation_files(data: Path) -> None:
    other = write_jsonl(data.with_name("other.jsonl"), arithmetic_rows(7, seed=9))
    config = config_of(data, validation=(str(other),))
    assert len(open_store(config, TINY, "validation")) == 7
    assert len(open_store(config, TINY, "train")) == 50
    with pytest.raises(DataError, match=r"is in both data\.train and data\.validation"):
        open_store(config_of(data, validation=(str(data),)), TINY)
    with pytest.raises(DataError, match=r"set data\.validation or data\.validation_share"):
        open_store(config_of(data), TINY, "validation")
    with pytest.raises(DataError, match=r"data\.validation: .* does not exist"):
        open_store(config_of(data, validation=("absent.jsonl",)), TINY, "validation")


@pytest.mark.parametrize("content", ["\n\n", '{"messages": [{"role": "user", "content": "q"}]}\n'])
def test_no_sample_left_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"no row at all|no train sample is left"):
        open_store(config_of(path), TINY)


def test_key_follows_everything_that_matters(data: Path, tmp_path: Path) -> None:
    base = config_of(data)
    keys = [open_store(base, TINY).key]
    template = tmp_path / "chat.jinja"
    template.write_text((TINY / "chat_template.jinja").read_text())
    changes: list[dict[str, Any]] = [
        {"max_length": 1000},
        {"overlong": "truncate"},
        {"trained_turns": "last"},
        {"validation_share": 0.5},
        {"chat_template": template},
    ]
    keys += [open_store(config_of(data, **change), TINY).key for change in changes]
    template.write_text(template.read_text() + "{# changed #}")
    keys.append(open_store(config_of(data, chat_template=template), TINY).key)
    with data.open("a") as stream:
        stream.write(json.dumps(next(arithmetic_rows(1, seed=8))) + "\n")
    keys.append(open_store(base, TINY).key)
    assert len(set(keys)) == len(keys)
    assert open_store(config_of(data, workers=2), TINY).key == keys[-1]
    moved = data.rename(data.with_name("moved.jsonl"))
    assert open_store(config_of(moved), TINY).key == keys[-1]


def test_complete_store_is_opened_without_a_tokenizer(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_store(config_of(data), TINY)
    monkeypatch.setattr("megatron_klear.data.store.load_spec", None)
    assert contents(open_store(config_of(data), TINY)) == contents(first)


@pytest.mark.parametrize("name", ["rows.bin", "rows.idx", "rows.spans", "summary.json"])
@pytest.mark.parametrize("how", ["cut", "removed"])
def test_damaged_store_is_built_again(data: Path, name: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(config_of(data), TINY)
    expected, path = contents(store), store.folder / name
    replacement = path.read_bytes()[:-3]
    path.unlink()
    if how == "cut":
        path.write_bytes(replacement)
    assert contents(open_store(config_of(data), TINY)) == expected
    assert "damaged" in caplog.text


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


OPEN = """
import sys, time
from pathlib import Path
import megatron_klear.data.build as build, megatron_klear.data.store as store
from megatron_klear.config import DataConfig
data, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "slow rows":
    chunks = build.read_chunks
    def slowly(path):
        yield from chunks(path)
        print("stuck", flush=True)
        time.sleep(600)
    build.read_chunks, build._BYTES_PER_WORKER = slowly, 1
if mode == "slow end":
    def stuck(path):
        print("stuck", flush=True)
        time.sleep(600)
    build._flush_to_disk = stuck
if mode == "count":
    real = store.build
    store.build = lambda *arguments: (print("built"), real(*arguments), time.sleep(0.5))
config = DataConfig(train=(str(data),), cache=data.parent / "cache", workers=2)
print(len(store.open_store(config, Path(sys.argv[3]))))
"""


def start(data: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, str(data), mode, str(TINY)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)


def test_many_processes_build_once(data: Path) -> None:
    processes = [start(data, "count") for _ in range(4)]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(outputs) == [["50"]] * 3 + [["built", "50"]]


@pytest.mark.parametrize("mode", ["slow rows", "slow end"])
def test_killed_builder_leaves_nothing_half_valid(data: Path, mode: str) -> None:
    process = start(data, mode)
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    workers = children(process.pid)
    waiting = start(data, "count")
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert waiting.communicate(timeout=120)[0].split() == ["built", "50"]
    assert len(entries(data.parent / "cache")) == 1, "the killed builder's remains are gone"
    assert len(workers) == (2 if mode == "slow rows" else 0)
    assert not any(alive(worker) for worker in workers)
    assert len(contents(open_store(config_of(data), TINY))) == 50


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_builder_without_file_locks(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert len(open_store(config_of(data), TINY)) == 50


def test_full_disk_is_named_and_leaves_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, tokens: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "append", full)
    config = config_of(data)
    with pytest.raises(OSError, match=r"no space for tokenized data under data\.cache"):
        open_store(config, TINY)
    assert not entries(config.cache)


def test_real_rows(shared_data: Path, tmp_path: Path) -> None:
    rows = json.loads((shared_data / "long_cot" / "marco_o1_CoT_demo_125.json").read_text())
    path = write_jsonl(
        tmp_path / "marco.jsonl", ({"prompt": r["instruction"], "response": r["response"]} for r in rows)
    )
    store = open_store(config_of(path, max_length=2000), shared_data / "tokenizer_qwen3")
    assert store.summary.read == len(rows) == 125
    assert len(store) + store.summary.overlong == 125
    tokenizer = load_tokenizer(shared_data / "tokenizer_qwen3")
    sample = store[0]
    assert tokenizer.decode(sample.tokens[sample.trained]) == rows[0]["response"] + "<|im_end|>"
