"""What is kept of a step's samples: every number beside the token it speaks of."""

import json
from dataclasses import replace

import numpy as np
import torch
from rl_groups import fixed_groups
from test_updates import algorithm, rows_of, updates_of

from megatron_klear.train.rollout_files import rollout_file, write_rollouts
from megatron_klear.train.token_ratios import ratios_by_sample
from megatron_klear.types import VersionSpan


def test_ratios_find_the_tokens_of_their_samples():
    groups = fixed_groups()
    samples = [sample for group in groups for sample in group.samples]
    updates = updates_of(groups)
    found = {}
    for update in updates:
        for batches in rows_of(update, algorithm(), data_size=3):
            # A ratio that tells its token: what the entry predicts.
            found |= ratios_by_sample(batches, [batch.targets.float() for batch in batches])
    assert sorted(found) == list(range(len(samples)))
    for number, sample in enumerate(samples):
        expected = np.where(sample.trained, sample.tokens.astype(np.float32), np.nan)
        np.testing.assert_array_equal(found[number], expected)


def test_tokens_without_a_weight_have_no_ratio():
    (update,) = updates_of(fixed_groups(groups=1))
    batches = [replace(batch, weights=batch.weights * 0) for rank in rows_of(update, algorithm()) for batch in rank]
    found = ratios_by_sample(batches, [torch.ones(batch.num_tokens) for batch in batches])
    assert all(np.isnan(ratios).all() for ratios in found.values())


def test_a_line_has_the_response_and_its_numbers(tmp_path):
    trained, other = fixed_groups(groups=2)
    head, length = len(trained.prompt.tokens), len(trained.samples[1].tokens)
    spans = (VersionSpan(3, head, head + 5), VersionSpan(4, head + 5, length))
    samples = [trained.samples[0], replace(trained.samples[1], policy_version=3, version_spans=spans)]
    group = replace(trained, samples=samples, texts=["a", "b"], scores=(trained.scores or [])[:2])
    ratios = [np.arange(len(sample.tokens), dtype=np.float32) / 8 for sample in samples]
    ratios[1][-1] = np.nan
    write_rollouts(tmp_path, 7, [group, other], {id(group): np.array([0.5, -0.5])}, {id(group): ratios})
    lines = [json.loads(line) for line in rollout_file(tmp_path, 7).read_text().splitlines()]
    assert len(lines) == 2 + len(other.samples)
    for line, sample, of_sample in zip(lines, samples, ratios, strict=False):
        assert line["token_ids"] == sample.tokens[head:].tolist()
        assert len(line["logprobs"]) == len(line["ratio"]) == len(line["token_ids"])
        assert line["ratio"][:-1] == [round(value, 4) for value in of_sample[head:-1].tolist()]
    assert lines[1]["ratio"][-1] is None
    assert lines[1]["version_spans"] == [[3, 0, 5], [4, 5, length - head]]
    assert lines[0]["version_spans"] == []
    assert [line["advantage"] for line in lines[:2]] == [0.5, -0.5]
    assert (lines[2]["ratio"], lines[2]["advantage"]) == (None, None)
