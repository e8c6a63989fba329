"""Selection: which rows stay, by source, field, verdict and spread, and that nothing but the settings decides it."""

import json
from pathlib import Path

import numpy as np
import pytest
from curation_rows import contents, curate, problem, read, sentence, write

from megatron_klear.curation.features import rounded
from megatron_klear.curation.k_center import k_center
from megatron_klear.curation.text import problem_id
from megatron_klear.data.rows import DataError


def k_center_ref(vectors: np.ndarray, count: int, first: int) -> list[int]:
    """The plain way: all distances, in whole numbers."""
    wide = vectors.astype(np.int64)
    chosen = [first]
    while len(chosen) < count:
        nearest = ((wide[:, None] - wide[chosen][None]) ** 2).sum(axis=2).min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)


def select(folder: Path, name: str, rows: list[Path], *flags: object) -> list[dict]:
    """Rows that `klear curate select` keeps, its report last."""
    report = curate("select", "--input", *rows, "--output", folder / name / "rows.jsonl", *flags)
    return [*read(folder / name / "rows.jsonl"), report]


@pytest.fixture
def sources(tmp_path):
    """Three files of 30, 20 and 4 rows."""
    return [
        write(tmp_path / f"{name}.jsonl", *(problem(f"{name} {sentence(k, 20)}") for k in range(count)))
        for name, count in (("big", 30), ("middle", 20), ("small", 4))
    ]


@pytest.mark.parametrize("count", [1, 5, 40])
def test_k_center_is_the_plain_one(count):
    vectors = rounded(np.random.default_rng(count).normal(size=(60, 24)))
    vectors[10:15] = vectors[3]
    assert k_center(vectors, count, 7).tolist() == k_center_ref(vectors, count, 7)


def test_each_group_of_problems_has_a_row_in_a_subset_of_that_size(tmp_path):
    groups = [sentence(1000 + group, 30) for group in range(8)]
    texts = [f"{groups[k % 8]} variant {k}" for k in range(200)]
    rows = write(tmp_path / "rows.jsonl", *map(problem, texts))
    *kept, _ = select(tmp_path, "out", [rows], "--method", "k_center", "--total", 8)
    assert sorted(row["prompt"].split(" variant")[0] for row in kept) == sorted(groups)


def test_embeddings_of_the_user_s_own_decide_instead(tmp_path):
    rows = write(tmp_path / "rows.jsonl", *(problem(f"alike {k}") for k in range(40)), b"{")
    chosen = np.random.default_rng(0)
    near, far = chosen.normal(0, 0.01, size=(41, 6)) + np.eye(6)[0], np.eye(6)
    near[[4, 17, 30]] = far[[1, 2, 3]]
    np.save(tmp_path / "vectors.npy", near.astype(np.float32))
    given = ("--method", "k_center", "--total", 4, "--features", tmp_path / "vectors.npy")
    *kept, report = select(tmp_path, "out", [rows], *given)
    assert {"alike 4", "alike 17", "alike 30"} < {row["prompt"] for row in kept}
    assert report["bad"] == {"malformed_json": 1}
    np.save(tmp_path / "vectors.npy", near[:40])
    with pytest.raises(DataError, match="has 40 rows, the inputs 41"):
        select(tmp_path, "other", [rows], *given)


@pytest.mark.parametrize("method", ["first", "random", "k_center"])
def test_a_total_is_shared_out_evenly_and_the_seed_and_nothing_else_decides(tmp_path, sources, method):
    given = ("--total", 24, "--method", method, "--seed", 3)
    *kept, report = select(tmp_path, "one", sources, *given)
    assert report["chosen"] == dict(zip(map(str, sources), (10, 10, 4), strict=True))
    assert len({row["prompt"] for row in kept}) == 24
    select(tmp_path, "three", sources, *given, "--workers", 3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    *others, _ = select(tmp_path, "seed", sources, *given[:-1], 4)
    assert (others == kept) == (method == "first")


def test_top_sources_are_files_in_order_or_values_of_a_field_by_a_ranking(tmp_path, sources):
    *kept, report = select(tmp_path, "files", sources[::-1], "--top-sources", 2, "--per-source", 3)
    assert [row["prompt"].split()[0] for row in kept] == ["small"] * 3 + ["middle"] * 3
    assert report["dropped"] == {"not_chosen": 18, "other_source": 30}
    named = [{**problem(f"{name} {k}"), "extra_info": {"of": name}} for k in range(3) for name in ("a", "b", "c")]
    rows = write(tmp_path / "rows.jsonl", *named, problem("nobody's"))
    given = ("--source", "extra_info.of", "--ranking", "c", "a", "b")
    *kept, report = select(tmp_path, "field", [rows], *given, "--top-sources", 1)
    assert [row["prompt"] for row in kept] == ["c 0", "c 1", "c 2"]
    assert report["bad"] == {"missing_field": 1}
    with pytest.raises(DataError, match="no row of the source 'd'"):
        select(tmp_path, "none", [rows], "--source", "extra_info.of", "--ranking", "d", "a")


def test_verdicts_and_fields_choose(tmp_path):
    passed = {"easy": [True, True, True, False], "hard": [False, False, True, False]}
    rows = [
        {"prompt": name, "response": f"{k}", "sample": k, "teacher": "new" if k % 2 else "old"}
        for name in passed
        for k in range(4)
    ]
    rows += [{"prompt": "unseen", "response": "0", "sample": 0, "teacher": "old"}, {"prompt": "easy", "response": "x"}]
    lines = [
        {"problem": problem_id(name), "sample": k, "passed": verdict, "score": 0.5, "verdict": "x", "answer": ""}
        for name, verdicts in passed.items()
        for k, verdict in enumerate(verdicts)
    ]
    rows, verdicts = write(tmp_path / "rows.jsonl", *rows), write(tmp_path / "verdicts.jsonl", *lines)

    def kept(name: str, *flags: object) -> tuple[list[str], dict]:
        *chosen, report = select(tmp_path, name, [rows], "--verdicts", verdicts, *flags)
        return [f"{row['prompt']} {row['response']}" for row in chosen], report

    assert kept("only", "--correct", "only")[0] == ["easy 0", "easy 1", "easy 2", "hard 2"]
    chosen, report = kept("wrong", "--correct", "wrong", "--difficulty", "hard")
    assert chosen == ["hard 0", "hard 1", "hard 3"]
    assert report["bad"] == {"missing_field": 1, "no_verdict": 1}
    assert report["pass_rates"] == [0, 0, 3] + [0] * 8
    assert kept("easy", "--difficulty", "easy")[0] == [f"easy {k}" for k in (0, 1, 2, 3, "x")]
    chosen, report = kept("teacher", "--where", "teacher=new")
    assert chosen == ["easy 1", "easy 3", "hard 1", "hard 3"]
    assert report["dropped"] == {"other_teacher": 5}
    verdicts.write_text(verdicts.read_text() + json.dumps({**lines[0], "passed": False}))
    with pytest.raises(DataError, match="both passes and does not"):
        kept("torn")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--correct", "only"], "need verdicts"),
        (["--method", "random"], "chooses nothing without total or per_source"),
        (["--features", "x.npy"], "by the method k_center alone"),
        (["--source", "of", "--top-sources", "1"], "needs a ranking"),
        (["--where", "teacher"], "expected field=value"),
        (["--total", "0"], "expected a whole number above 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, capsys, flags, told):
    with pytest.raises(SystemExit):
        curate("select", "--input", write(tmp_path / "r.jsonl", problem("x")), "--output", tmp_path / "o.jsonl", *flags)
    assert told in " ".join(capsys.readouterr().err.split())
