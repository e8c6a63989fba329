"""What is kept of a step's samples: every number beside the token it speaks of."""

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rl_groups import fixed_groups
from test_updates import algorithm, rows_of, updates_of

from megatron_klear.runs import rollout_files as rollout_files_module
from megatron_klear.runs.rollout_files import RolloutWriter, read_samples, rollout_file, rollout_files
from megatron_klear.train.token_ratios import ratios_by_sample
from megatron_klear.types import VersionSpan


def test_ratios_find_the_tokens_of_their_samples():
    groups = fixed_groups()
    samples = [sample for group in groups for sample in group.samples]
    updates = updates_of(groups)
    found = {}
    for update in updates:
        for batches in rows_of(groups, update, algorithm(), data_size=3):
            # A ratio that tells its token: what the entry predicts.
            found |= ratios_by_sample(batches, [batch.targets.float() for batch in batches])
    assert sorted(found) == list(range(len(samples)))
    for number, sample in enumerate(samples):
        expected = np.where(sample.trained, sample.tokens.astype(np.float32), np.nan)
        np.testing.assert_array_equal(found[number], expected)


def test_tokens_without_a_weight_have_no_ratio():
    groups = fixed_groups(groups=1)
    (update,) = updates_of(groups)
    rows = rows_of(groups, update, algorithm())
    batches = [replace(batch, weights=batch.weights * 0) for rank in rows for batch in rank]
    found = ratios_by_sample(batches, [torch.ones(batch.num_tokens) for batch in batches])
    assert all(np.isnan(ratios).all() for ratios in found.values())


def one_group_of_two():
    trained, other = fixed_groups(groups=2)
    head, length = len(trained.prompt.tokens), len(trained.samples[1].tokens)
    spans = (VersionSpan(3, head, head + 5), VersionSpan(4, head + 5, length))
    samples = [trained.samples[0], replace(trained.samples[1], policy_version=3, version_spans=spans)]
    return replace(trained, samples=samples, texts=["a", "b"], scores=(trained.scores or [])[:2]), other


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_sample_has_the_response_and_its_numbers(tmp_path, form):
    group, other = one_group_of_two()
    head, length = len(group.prompt.tokens), len(group.samples[1].tokens)
    ratios = [np.arange(len(sample.tokens), dtype=np.float32) / 8 for sample in group.samples]
    ratios[1][-1] = np.nan
    ratios[1][-2] = np.inf
    with closing(RolloutWriter(tmp_path, form=form)) as writer:
        writer.write(7, [group, other], {id(group): np.array([0.5, -0.5])}, {id(group): ratios})
    assert [path.name for path in tmp_path.iterdir()] == [f"step-00000007.{form}"]
    total, rows = read_samples(rollout_file(tmp_path, 7))
    assert total == len(rows) == 2 + len(other.samples)
    for row, sample, of_sample in zip(rows, group.samples, ratios, strict=False):
        assert row["token_ids"] == sample.tokens[head:].tolist()
        np.testing.assert_allclose(row["logprobs"], sample.logprobs[head:], rtol=1e-3)
        assert row["ratio"][:-2] == of_sample[head:-2].tolist()
        assert (row["step"], row["prompt_id"], row["prompt"]) == (7, group.prompt.id, group.prompt.text)
        assert row["ground_truth"] == group.prompt.ground_truth
    assert rows[1]["ratio"][-2:] == [65504.0, None]
    assert rows[1]["version_spans"] == [[3, 0, 5], [4, 5, length - head]]
    assert rows[0]["version_spans"] == []
    assert [row["advantage"] for row in rows[:2]] == [0.5, -0.5]
    assert [row["response"] for row in rows[:2]] == ["a", "b"]
    assert (rows[2]["ratio"], rows[2]["advantage"]) == (None, None)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_few_samples_are_read_from_all_over_a_step(tmp_path, form):
    group, _ = one_group_of_two()
    groups = [replace(group, prompt=replace(group.prompt, id=str(number))) for number in range(40)]
    with closing(RolloutWriter(tmp_path, form=form)) as writer:
        writer.write(1, groups)
    total, rows = read_samples(rollout_file(tmp_path, 1), at_most=5)
    assert total == 80
    assert [(row["prompt_id"], row["response"]) for row in rows] == [
        ("0", "a"), ("9", "b"), ("19", "b"), ("29", "b"), ("39", "b")
    ]  # fmt: skip


def test_a_share_of_the_groups_and_the_newest_steps_are_kept(tmp_path):
    group, _ = one_group_of_two()
    groups = [replace(group, prompt=replace(group.prompt, id=str(number))) for number in range(10)]
    with closing(RolloutWriter(tmp_path, share=0.25, keep_steps=2, form="parquet")) as writer:
        for step in range(1, 5):
            writer.write(step, groups)
    assert [path.name for path in rollout_files(tmp_path)] == ["step-00000003.parquet", "step-00000004.parquet"]
    rows = read_samples(rollout_file(tmp_path, 4))[1]
    assert sorted({row["prompt_id"] for row in rows}) == ["0", "3", "6"]
    assert len(rows) == 6, "a group that is kept is whole"


def test_a_step_that_cannot_be_written_is_told_at_the_next(tmp_path):
    group, _ = one_group_of_two()
    (tmp_path / "file").write_text("in the way")
    writer = RolloutWriter(tmp_path / "file")
    writer.write(1, [group])
    for ask in (lambda: writer.write(2, [group]), lambda: writer.flush(1), lambda: writer.flush(2), writer.flush):
        with pytest.raises(OSError, match="file"):
            ask()
    writer.close()  # which says no more of it


def test_what_a_kill_left_half_written_is_swept(tmp_path):
    (tmp_path / ".step-00000004.parquet.partial").write_bytes(b"PAR1")
    RolloutWriter(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_run_before_finishes_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda folder, _: iter([folder / ".step-00000004.parquet.partial"]))
    RolloutWriter(tmp_path).close()


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    group, _ = one_group_of_two()
    with closing(RolloutWriter(tmp_path, form="parquet")) as writer:
        writer.write(1, [group])
    path = rollout_file(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OSError, match=r"step-00000001\.parquet is damaged"):
        read_samples(path)


def test_a_small_step_is_jsonl_and_a_large_one_parquet(tmp_path, monkeypatch):
    group, _ = one_group_of_two()
    tokens = sum(int(sample.trained.sum()) for sample in group.samples)
    for limit, form in ((tokens, "jsonl"), (tokens - 1, "parquet"), (tokens, "jsonl")):
        monkeypatch.setattr(rollout_files_module, "SMALL_STEP_TOKENS", limit)
        with closing(RolloutWriter(tmp_path)) as writer:
            writer.write(3, [group])
        assert [path.name for path in tmp_path.iterdir()] == [f"step-00000003.{form}"]


def test_files_of_earlier_releases_are_read(tmp_path):
    (tmp_path / "step-00000001.jsonl").write_text('{"prompt_id": "a"}\n{"prompt_id": "b"}\n{"torn')
    (path,) = rollout_files(tmp_path)
    assert read_samples(path) == (3, [{"prompt_id": "a"}, {"prompt_id": "b"}])


def test_a_token_takes_less_than_eight_bytes(tmp_path):
    group, _ = one_group_of_two()
    draw = np.random.default_rng(0)
    samples, ratios, texts, size = [], [], [], 4096
    for _ in range(8):
        # Rarely repeated tokens, noisy numbers and the text: more than a response of a language model has to tell.
        tokens = (draw.zipf(1.2, size) % 150_000).astype(np.int32)
        trained = np.ones(size, dtype=bool)
        logprobs = np.log(draw.uniform(0.05, 1, size)).astype(np.float32)
        samples.append(replace(group.samples[0], tokens=tokens, trained=trained, logprobs=logprobs))
        ratios.append(np.exp(draw.normal(0, 0.1, size)).astype(np.float32))
        texts.append(" ".join(str(token) for token in tokens[: size // 2]))
    prompt = replace(group.prompt, tokens=np.zeros(0, dtype=np.int32))
    scores = [(group.scores or [])[0]] * 8
    whole = replace(group, prompt=prompt, samples=samples, texts=texts, scores=scores)
    with closing(RolloutWriter(tmp_path, form="parquet")) as writer:
        writer.write(1, [whole], {id(whole): np.ones(8)}, {id(whole): ratios})
    assert rollout_file(tmp_path, 1).stat().st_size <= 8 * 8 * size


def test_a_flush_of_an_earlier_step_does_not_wait_for_a_later_one(tmp_path, monkeypatch):
    group, _ = one_group_of_two()
    may_write, write = threading.Event(), RolloutWriter._write

    def held(self, step, rows):
        assert step < 2 or may_write.wait(60)
        write(self, step, rows)

    monkeypatch.setattr(RolloutWriter, "_write", held)
    with closing(RolloutWriter(tmp_path)) as writer:
        writer.write(1, [group])
        writer.write(2, [group])
        writer.flush(1)
        assert [path.stem for path in rollout_files(tmp_path)] == ["step-00000001"]
        waiting = threading.Thread(target=writer.flush, args=(2,))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        may_write.set()
        waiting.join(60)
        assert [path.stem for path in rollout_files(tmp_path)] == ["step-00000001", "step-00000002"]
