"""Ground truths on disk: every value comes back as what it was, and what is not there is told, never guessed."""

import math
import os
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rewards.base import RewardError, RewardSettings
from megatron_klear.rewards.plain import PlainError, from_json, to_json
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.truth_store import Truth, TruthReadError, TruthRef, TruthStore, read_truth
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Verdict

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=8)
    | st.binary(max_size=8)
)
KEYS = st.text(max_size=3) | st.just("$") | st.integers() | st.tuples(st.integers(), st.text(max_size=2))
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


def types_of(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value), [types_of(entry) for entry in value]
    if isinstance(value, dict):
        return type(value), [(types_of(key), types_of(entry)) for key, entry in value.items()]
    return type(value)


@given(VALUES)
def test_every_value_comes_back_with_its_type(value: Any) -> None:
    content = to_json(value)
    assert b"\n" not in content
    assert from_json(content) == value
    assert types_of(from_json(content)) == types_of(value)


@pytest.mark.parametrize(
    "value",
    [
        *(np.float32(0.1), np.float64(0.1), np.int8(-3), np.bool_(True), np.str_("é"), np.datetime64("2026-01-02")),
        *(np.zeros((2, 0, 3)), np.arange(6, dtype=">i4").reshape(2, 3), np.array(["a", "bc"]), np.array(7)),
        *(datetime(2026, 1, 2, 3, 4, 5, 6, UTC), date(2026, 1, 2), time(3, 4), Decimal("0.10"), -0.0, "\ud800\u2028\n"),
    ],
    ids=repr,
)
def test_values_of_data_files_come_back(value: Any) -> None:
    found = from_json(to_json(value))
    assert type(found) is type(value)
    assert np.array_equal(found, value)
    assert getattr(found, "dtype", None) == getattr(value, "dtype", None)
    assert repr(found) == repr(value)


def test_numbers_that_are_none_and_lists_in_arrays_come_back() -> None:
    nan, infinite, lists = from_json(to_json([math.nan, -math.inf, np.array([[1], None, "x"], dtype=object)]))
    assert math.isnan(nan)
    assert infinite == -math.inf
    assert (lists.dtype, lists.tolist()) == (object, [[1], None, "x"])
    alike = np.empty(2, dtype=object)
    alike[0], alike[1] = [1, 2], [3, 4]
    assert from_json(to_json(alike)).tolist() == [[1, 2], [3, 4]]


class Number(int):
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"tests": [1, {2, 3}]}, r"tests\[1\] is \{2, 3\} of type builtins\.set"),
        ({"a": {"b": object}}, r"a\.b is <class 'object'>"),
        (Number(3), r"it is 3 of type .*Number"),
        (np.zeros(1, dtype=[("a", "i4")]), "numpy.ndarray, which JSON does not hold"),
        (10**5000, "4300 digits"),
    ],
    ids=["a set", "a class", "a subclass", "records", "too many digits"],
)
def test_other_values_are_refused_by_their_place(value: Any, words: str) -> None:
    with pytest.raises(PlainError, match=words):
        to_json(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(PlainError, match="holds itself"):
        to_json(value)


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"\xff",
            b'{"$": ["set", 1]}',
            b'{"$": []}',
            b'{"$": ["bytes", "?"]}',
            b'{"$": ["tuple"], "a": 1}',
        ),
        *(b'{"$": ["array", "O", [1], "AAAAAAAAAAA="]}', b'{"$": ["array", "<f4", [3], "zczMPQ=="]}', b'{"$": 3}'),
    ],
)
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(PlainError):
        from_json(content)


TRUTHS = [("math", "18", None), ("code", {"tests": ["1\n2"], "b": b"\0"}, {"level": (1,)}), ("math", 0.5, {"é": 1})]


def test_a_store_is_written_once_and_read_by_place(tmp_path: Path) -> None:
    store = TruthStore.write(tmp_path / "truths", iter(TRUTHS))
    assert [read_truth(ref, source) for ref, (source, _, _) in zip(store, TRUTHS, strict=True)] == [
        Truth(*truth) for truth in TRUTHS
    ]
    assert len(store.path.read_bytes().splitlines()) == len(store) == 3
    assert list(TruthStore.open(store.path)) == list(store)
    assert list(TruthStore.write(tmp_path / "truths", TRUTHS)) == list(store)
    assert len(list((tmp_path / "truths").iterdir())) == 2
    other = TruthStore.write(tmp_path / "truths", TRUTHS[:1])
    assert other.path != store.path
    assert read_truth(store[2], "math").ground_truth == 0.5
    with pytest.raises(IndexError):
        store[3]
    assert list(TruthStore.write(tmp_path / "none", [])) == []


def test_what_has_no_form_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = [*TRUTHS, ("code", {"tests": {1}}, None)]
    with pytest.raises(RewardError, match=r"^p\.jsonl:4 \(data_source 'code'\): ground_truth\.tests is \{1\}"):
        TruthStore.write(tmp_path, rows, place=lambda number: f"p.jsonl:{number + 1}")

    def breaks() -> Iterator[tuple[str, Any, Any]]:
        yield TRUTHS[0]
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        TruthStore.write(tmp_path, breaks())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_or_missing_file_is_told(tmp_path: Path) -> None:
    store = TruthStore.write(tmp_path, TRUTHS)
    with pytest.raises(TruthReadError, match="but one of 'math'"):
        read_truth(store[0], "code")
    moved = TruthRef(str(store.path), store[1].offset + 1, store[1].length)
    with pytest.raises(TruthReadError, match="changed or cut since it was written"):
        read_truth(moved, "code")
    os.truncate(store.path, store[2].offset + 5)
    with pytest.raises(TruthReadError, match="changed or cut since it was written"):
        read_truth(store[2], "math")
    with pytest.raises(RewardError, match=r"its index .* speaks of another file"):
        TruthStore.open(store.path)
    assert read_truth(store[1], "code").ground_truth == TRUTHS[1][1]
    store.path.unlink()
    with pytest.raises(TruthReadError, match=f"{store.path}: No such file.*must see the folder"):
        read_truth(store[1], "code")
    with pytest.raises(RewardError, match="cannot be read"):
        TruthStore.open(store.path)


def exact_reward(response: str, ground_truth: Any, extra_info: Any) -> float:
    assert isinstance(ground_truth, tuple)
    return float(response in ground_truth) + extra_info["bonus"]


def test_a_request_holds_its_place_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    settings = RewardSettings(require_thinking=False, functions={"exact": "test_truth_store:exact_reward"})
    rows = [("math", "18", None), ("exact", ("a", "b"), {"bonus": 0.25}), ("math", "19", None)]
    store = TruthStore.write(tmp_path, rows)
    lost = TruthRef(str(tmp_path / "lost.jsonl"), 0, 10)
    trials = [Request("math", store[0], "\\boxed{0}"), Request("exact", store[1], "0")]
    with GradingPool(["math", "exact"], settings, workers=1, timeout_seconds=60, trials=trials) as pool:
        pool.wait_until_ready()
        asked = [Request("math", store[0], "18"), Request("exact", store[1], "b"), Request("math", store[2], "18")]
        scores = pool.grade([*asked, Request("math", lost, "18"), Request("math", store[0], "18")])
        assert [score.verdict.value for score in scores] == ["right", "right", "wrong", "error", "right"]
        assert scores[1].reward == 1.25
        assert str(tmp_path / "lost.jsonl") in scores[3].note
        assert pool.restarts == 0
    with (
        GradingPool(["math"], settings, workers=1, trials=[Request("math", lost, "x")]) as pool,
        pytest.raises(RewardError, match=r"lost\.jsonl: No such file"),
    ):
        pool.wait_until_ready()
    with pytest.raises(ValueError, match="lies on disk"):
        Request("math", store[0], "x", {"a": 1})
    assert pool.failure(Request("math", "4", "x"), Verdict.ERROR, "").reward == -1.0
