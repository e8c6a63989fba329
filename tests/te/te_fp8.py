"""What ranks run to hold rows, as the engine lays them out, against what transformer-engine asks of FP8 products."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.config.base import ParallelConfig, SFTConfig
from megatron_klear.mcore.rows import local_row
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import Architecture, read_architecture
from megatron_klear.types import PackedBatch

LAYOUTS = tuple(
    ParallelConfig(tensor=tensor, sequence=sequence, context=context, pipeline=pipeline)
    for tensor, context, pipeline in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2))
    for sequence in ((True, False) if tensor > 1 else (False,))
)
"""Experts are left out: FP8 is refused with them."""


def packed(lengths: Sequence[int]) -> PackedBatch:
    """A row of sequences of these lengths, its tokens of no matter."""
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    tokens = torch.zeros(int(bounds[-1]), dtype=torch.int64)
    return PackedBatch(tokens=tokens, targets=tokens, weights=torch.zeros(len(tokens)), cu_seqlens=bounds)


def row_sizes(parallel: ParallelConfig, rows: Sequence[Sequence[int]], multiple: int) -> dict[int, Sequence[int]]:
    """Tokens of a context rank's part of each row as the engine makes it, and the first row of that size."""
    sizes: dict[int, Sequence[int]] = {}
    for lengths in rows:
        context = SimpleNamespace(rank=0, size=parallel.context)
        row = local_row(packed(lengths), SimpleNamespace(context=context, parallel=parallel), multiple)
        assert row.num_tokens == sum(lengths)
        sizes.setdefault(row.tokens.shape[1], lengths)
    return sizes


def refused(
    config: SFTConfig, layouts: Sequence[ParallelConfig], rows: Sequence[Sequence[int]], padded: bool = True
) -> list[str]:
    """What transformer-engine refuses, and of which layout and row, in this rank's share of the layouts.

    Without `padded` rows are padded for the layout alone.
    """
    architecture, found = read_architecture(config.model.path), []
    made: dict[tuple[int, int, int], dict[int, Sequence[int]]] = {}
    quantizers = _quantizers(config)
    for parallel in layouts[dist.get_rank() :: dist.get_world_size()]:
        run = config.model_copy(update={"parallel": parallel})
        multiple = run.row_multiple if padded else run.parallel.row_multiple
        made_by = (parallel.context, parallel.segment_multiple, multiple)  # all of a layout that a row's size knows
        if made_by not in made:
            made[made_by] = row_sizes(parallel, rows, multiple)
        for tokens, lengths in made[made_by].items():
            problems = sorted(set(_problems(run, architecture, tokens, quantizers)))
            found += [f"{parallel!r} {list(lengths)}: {problem}" for problem in problems]
    return found


def _quantizers(config: SFTConfig) -> list[Any]:
    """transformer-engine's own, of the recipe that Megatron makes of the settings: of inputs, and of gradients."""
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(
        SimpleNamespace(fp8=config.model.fp8, fp8_recipe=config.model.fp8_recipe, fp8_dot_product_attention=False)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module("transformer_engine.pytorch.quantization")
        except ImportError:
            module = importlib.import_module("transformer_engine.pytorch.fp8")  # its name before 2.8
    modes = {"forward": 3, "backward": 2}  # of a product: its input, weight and output; the gradients of two
    states = (module.RecipeState.create(recipe, mode=mode, num_quantizers=count) for mode, count in modes.items())
    return [state.make_quantizers()[0] for state in states]


def _problems(run: SFTConfig, architecture: Architecture, tokens: int, quantizers: list[Any]) -> Iterator[str]:
    """What is wrong with the products of a layer, forward and backward, of `tokens` tokens on a rank."""
    from megatron.core.fp8_utils import get_fp8_align_size
    from transformer_engine.pytorch import utils

    tensor, sequence = run.parallel.tensor, run.parallel.sequence and run.parallel.tensor > 1
    shard = tokens // tensor if sequence else tokens
    head, hidden, ffn = architecture.head_dim, architecture.hidden_size, architecture.ffn_hidden_size // tensor
    queries, kv = architecture.num_heads * head // tensor, architecture.num_kv_heads * head // tensor
    align = get_fp8_align_size(run.model.fp8_recipe)
    columns = [(shard, hidden, queries + 2 * kv), (shard, hidden, 2 * ffn)]
    for rows, inner, outer, gathered in (
        *((*column, sequence) for column in columns),
        (tokens, queries, hidden, False),
        (tokens, ffn, hidden, False),
    ):
        activation, weight = _shape(rows, 1, inner), _shape(outer, inner)
        gradient = _shape(tokens, outer) if gathered or not sequence else _shape(shard, outer)
        try:
            utils.assert_dim_for_fp8_exec(activation, weight)
            utils.assert_dim_for_fp8_exec(gradient)
            if hasattr(utils, "assert_dim_for_all_gather"):
                utils.assert_dim_for_all_gather(activation, gathered, quantizers[0])
        except (AssertionError, ValueError) as error:
            yield str(error)
        if rows % align:
            yield f"the weights' gradient sums over {rows} tokens, not a multiple of {align}"
        # Gathered as they are, and not quantized behind the gathering: inputs of the one kind, gradients of the other.
        gathers = ((quantizers[0], activation, gathered), (quantizers[1], gradient, sequence and not gathered))
        for quantizer, of, is_gathered in gathers:
            if is_gathered and not getattr(quantizer, "is_quantizable", lambda _: True)(of):
                yield f"{type(quantizer).__name__} does not take {list(of.shape)} as it is gathered"


def _shape(*sizes: int) -> Tensor:
    return torch.empty(sizes, device="meta")


def recipe_on(config: SFTConfig, major: int, minor: int, cuda: str) -> str:
    """On a rank: what is told of a recipe on another card and CUDA, empty where it is built."""
    from transformer_engine.pytorch import utils

    from megatron_klear.mcore.model import use_transformer_engine

    torch.version.cuda = cuda
    properties = SimpleNamespace(major=major, minor=minor)
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment]
    for name in ("get_device_compute_capability", "_get_device_compute_capability"):
        getattr(getattr(utils, name, None), "cache_clear", lambda: None)()
    try:
        return "" if use_transformer_engine(config) else "transformer-engine is not used"
    except RuntimeError as error:
        return str(error)


def built_recipe(config: SFTConfig) -> tuple[str, set[str]]:
    """On a rank: the class of the recipe that a model is built for, and of the layers that were built."""
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_klear.mcore.model import build_chunks

    with world(config.parallel) as topology:
        chunks = build_chunks(read_architecture(config.model.path), config, topology)
        recipe = get_fp8_recipe(chunks[0].config)
        return type(recipe).__name__, {type(module).__name__ for module in chunks[0].modules()}
