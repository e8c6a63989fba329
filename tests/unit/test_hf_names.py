"""The name table: what goes in comes out, in any shape and cut, and lies where Megatron reads it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.models.architecture import Architecture, Experts, Rope
from megatron_klear.models.names import QKV, Gated, Vocabulary, expected_tensors, name_table, placed_entries

TENSOR_PARALLEL = (1, 2, 4)


@st.composite
def experts(draw: st.DrawFn) -> Experts:
    """Experts whose matrices divide over 4 ranks."""
    count, ffn = draw(st.integers(1, 4)), 4 * draw(st.integers(1, 3))
    return Experts(count=count, chosen=draw(st.integers(1, count)), ffn_hidden_size=ffn, normalised=draw(st.booleans()))


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Shapes whose heads, MLP and experts divide over 4 tensor ranks; the vocabulary need not."""
    family = draw(st.sampled_from(["qwen3", "qwen2", "llama", "qwen3_moe"]))
    kv_heads = 4 * draw(st.integers(1, 2))
    return Architecture(
        family=family,
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 24)),
        ffn_hidden_size=4 * draw(st.integers(1, 6)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 37)),
        max_positions=16,
        norm_eps=1e-6,
        rope=Rope(theta=10000.0),
        tied_embeddings=draw(st.booleans()),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2",
        experts=draw(experts()) if family == "qwen3_moe" else None,
    )


@given(architecture=architectures(), size=st.sampled_from(TENSOR_PARALLEL))
@settings(max_examples=60, deadline=None)
def test_every_entry_survives_the_way_there_and_back(architecture: Architecture, size: int) -> None:
    for entry in name_table(architecture):
        whole = [torch.randn(shape) for shape in entry.shapes]
        shards = [entry.mapping.to_megatron(whole, rank, size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1, entry.megatron
        back = entry.mapping.to_hf(shards)
        assert [tuple(t.shape) for t in back] == list(entry.shapes)
        assert all(torch.equal(a, b) for a, b in zip(whole, back, strict=True)), entry.megatron


@given(architecture=architectures())
@settings(max_examples=60, deadline=None)
def test_the_table_names_every_parameter_once(architecture: Architecture) -> None:
    specs = expected_tensors(architecture)
    assert len({spec.name for spec in specs}) == len(specs)
    assert sum(spec.num_elements for spec in specs) == architecture.num_parameters
    spellings = [name for entry in name_table(architecture) for name in entry.megatron]
    assert len(set(spellings)) == len(spellings)
    assert ("lm_head.weight" in {spec.name for spec in specs}) is not architecture.tied_embeddings
    keys = [placed.key for placed in placed_entries(architecture)]
    assert len(set(keys)) == len(keys)


@given(vocab_size=st.integers(1, 50), size=st.sampled_from(TENSOR_PARALLEL), architecture=architectures())
@settings(deadline=None)
def test_padding_rows_are_zero_and_stay_inside(vocab_size: int, size: int, architecture: Architecture) -> None:
    fields = {name: getattr(architecture, name) for name in Architecture.__slots__}
    mapping = Vocabulary(Architecture(**{**fields, "vocab_size": vocab_size}))
    whole = torch.randn(vocab_size, 3)
    shards = [mapping.to_megatron([whole], rank, size) for rank in range(size)]
    stacked = torch.cat(shards)
    assert len(stacked) % size == 0
    assert torch.equal(stacked[:vocab_size], whole)
    assert not stacked[vocab_size:].any()
    marked = [torch.where(shard == 0, torch.tensor(7.0), shard) for shard in shards]
    assert torch.equal(mapping.to_hf(marked)[0], whole)


@pytest.mark.parametrize("rest", [(), (5,)], ids=["bias", "weight"])
@pytest.mark.parametrize("size", TENSOR_PARALLEL)
def test_qkv_lies_as_megatron_splits_it(size: int, rest: tuple[int, ...]) -> None:
    heads, groups, head_dim = 8, 4, 2
    q, k, v = (torch.randn(n * head_dim, *rest) for n in (heads, groups, groups))
    for rank in range(size):
        fused = QKV(heads, groups, head_dim).to_megatron([q, k, v], rank, size)
        # Attention.get_query_key_value_tensors: view per group, then split into its queries, its key, its value.
        per_group = fused.view(groups // size, (heads // groups + 2) * head_dim, *rest)
        query, key, value = torch.split(per_group, [heads // groups * head_dim, head_dim, head_dim], dim=1)
        mine = slice(rank * groups // size * head_dim, (rank + 1) * groups // size * head_dim)
        mine_q = slice(mine.start * heads // groups, mine.stop * heads // groups)
        assert torch.equal(query.reshape(-1, *rest), q[mine_q])
        assert torch.equal(key.reshape(-1, *rest), k[mine])
        assert torch.equal(value.reshape(-1, *rest), v[mine])


@pytest.mark.parametrize("size", TENSOR_PARALLEL)
def test_gate_is_above_up_on_every_rank(size: int) -> None:
    gate, up = torch.zeros(8, 3), torch.ones(8, 3)
    for rank in range(size):
        shard = Gated(8).to_megatron([gate, up], rank, size)
        assert torch.equal(shard[: 8 // size], gate[: 8 // size])
        assert torch.equal(shard[8 // size :], up[: 8 // size])
