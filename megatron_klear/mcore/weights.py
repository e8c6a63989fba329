"""Hugging Face weights in and out of Megatron's model, in any layout, through the table of `hf_names`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.config.base import ParallelConfig
from megatron_klear.distributed import exchange
from megatron_klear.errors import UserError
from megatron_klear.mcore.lora import is_adapter
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.names import EMBEDDING, HEAD, Entry, Placed, expected_tensors, name_table, placed_entries
from megatron_klear.models.safetensors_io import SafetensorsFolder

if TYPE_CHECKING:
    from megatron_klear.mcore.topology import Axis, Topology

_LOADABLE = (torch.float32, torch.bfloat16, torch.float16)
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Constants that old Llama exports saved beside the weights."""
_COMPARED_ROWS = 4096
_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)(.*)")
"""Experts as modules of their own, and as weights of a grouped one."""


class ConversionError(UserError, ValueError):
    """Weights that do not fit the config.json beside them, or the layout asked for."""


def open_weights(architecture: Architecture, folder: Path) -> SafetensorsFolder:
    """Open a folder's weights and check them against its config.json, all tensors and both ways, before any is used.

    Raises ConversionError naming tensor and file on a missing, unexpected, misshapen or quantised tensor, and on a head
    that contradicts `tie_word_embeddings`.
    """
    weights = SafetensorsFolder(folder)
    expected = {spec.name: spec.shape for spec in expected_tensors(architecture)}
    if HEAD not in weights.specs and not architecture.tied_embeddings and EMBEDDING in weights.specs:
        raise ConversionError(
            f"{weights.where(HEAD)} lacks {HEAD}, and {weights.folder / 'config.json'} says tie_word_embeddings = "
            "false; set it to true if the head is the embedding"
        )
    missing = [name for name in expected if name not in weights.specs]
    if missing:
        raise ConversionError(f"{weights.where(missing[0])} lacks {_listed(missing)}, which config.json asks for")
    extra = [name for name in weights.specs if name not in expected and not _BUFFERS.fullmatch(name)]
    if extra == [HEAD]:
        _check_tied_head(weights)
    elif extra:
        raise ConversionError(
            f"{weights.where(extra[0])} holds {_listed(extra)}, which the {architecture.family} model of its "
            "config.json does not have"
        )
    for name, shape in expected.items():
        spec = weights.specs[name]
        if spec.shape != shape:
            raise ConversionError(f"{spec.file}: {name} has shape {spec.shape}, config.json makes it {shape}")
        if spec.dtype not in _LOADABLE:
            raise ConversionError(f"{spec.file}: {name} is {spec.dtype}; weights must be bf16, fp16 or fp32")
    return weights


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _check_tied_head(weights: SafetensorsFolder) -> None:
    """A head saved beside a tied embedding is harmless as long as it says the same."""
    head, embedding = weights.sliced(HEAD), weights.sliced(EMBEDDING)
    same = weights.specs[HEAD].shape == weights.specs[EMBEDDING].shape
    for start in range(0, weights.specs[HEAD].shape[0] if same else 0, _COMPARED_ROWS):
        rows = slice(start, start + _COMPARED_ROWS)
        same = same and torch.equal(head[rows], embedding[rows])
    if not same:
        raise ConversionError(
            f"{weights.where(HEAD)}: {HEAD} differs from {EMBEDDING}, but {weights.folder / 'config.json'} says "
            "tie_word_embeddings = true; set it to false"
        )


def check_divisible(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Raise ConversionError when heads, MLP, experts or layers cannot be cut into that many parts."""
    divided = [
        ("num_attention_heads", architecture.num_heads, "tensor", parallel.tensor),
        ("num_key_value_heads", architecture.num_kv_heads, "tensor", parallel.tensor),
        ("num_hidden_layers", architecture.num_layers, "pipeline", parallel.pipeline),
    ]
    if architecture.experts is None:
        divided.append(("intermediate_size", architecture.ffn_hidden_size, "tensor", parallel.tensor))
    else:
        inner = architecture.experts.ffn_hidden_size
        divided.append(("num_experts", architecture.experts.count, "expert", parallel.expert))
        divided.append(("moe_intermediate_size", inner, "expert tensor", parallel.expert_tensor_size))
    for key, count, axis, size in divided:
        if count % size:
            raise ConversionError(f"{key} {count} does not divide over {axis} parallelism {size}")


@torch.no_grad()
def load_hf_weights(chunks: Sequence[Any], architecture: Architecture, folder: Path, topology: Topology) -> None:
    """Copy a Hugging Face folder's weights into this rank's model chunks, reading only this rank's slices.

    One replica (of experts, of theirs) reads them and sends them to the others: a network disk serves 16 GB once, not
    128 times. Every rank reads the files' headers, so that ConversionError and SafetensorsError are raised the same on
    all, before the first parameter is touched. Parameters keep their dtype and device. Collective over the replicas.
    An optimizer with its own master weights must reload them afterwards.
    """
    check_divisible(architecture, topology.parallel)
    weights = open_weights(architecture, folder)
    found = _local_parameters(chunks, architecture)
    read = {placed: parameter for placed, parameter in found.items() if _replicas(placed, topology).first}
    _fill(read, architecture, topology, weights.sliced)
    for placed, parameter in found.items():
        replicas = _replicas(placed, topology)
        if replicas.size > 1:
            dist.broadcast(parameter, src=dist.get_global_rank(replicas.group, 0), group=replicas.group)


@torch.no_grad()
def load_random_weights(chunks: Sequence[Any], architecture: Architecture, seed: int, topology: Topology) -> None:
    """Fill the chunks with a fresh initialisation that depends on the seed alone, never on the layout.

    Every Hugging Face tensor is drawn by itself from (seed, name): norms 1, biases 0, matrices N(0, 0.02), those that
    write to the residual stream divided by sqrt(2 * layers) as Megatron does.
    """
    check_divisible(architecture, topology.parallel)
    shapes = {spec.name: spec.shape for spec in expected_tensors(architecture)}

    def draw(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name])
        if name.endswith(".bias"):
            return torch.zeros(shapes[name])
        scale = (2 * architecture.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        return torch.empty(shapes[name]).normal_(std=0.02 * scale, generator=generator_of(seed, name))

    _fill(_local_parameters(chunks, architecture), architecture, topology, draw)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for one tensor, the same in every layout and on every rank."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _fill(
    parameters: dict[Placed, Tensor], architecture: Architecture, topology: Topology, source: Callable[[str], Any]
) -> None:
    """Set parameters from whole tensors (or slices of them) looked up by Hugging Face name."""
    for placed, parameter in parameters.items():
        names = placed.hf
        if names == [HEAD] and architecture.tied_embeddings:
            names = [EMBEDDING]  # the last pipeline stage's own copy
        sources = [source(name) for name in names]
        axis = _cut(placed, topology)
        shard = placed.entry.mapping.to_megatron(sources, axis.rank, axis.size)
        if shard.shape != parameter.shape:
            raise ConversionError(
                f"{', '.join(names)} make a shard of {tuple(shard.shape)}, the model's is {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)


@torch.no_grad()
def iter_hf_weights(
    chunks: Sequence[Any],
    architecture: Architecture,
    topology: Topology,
    *,
    value_of: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name, whole, on every rank, in the parameters' dtype and device.

    Collective over the tensor, expert and pipeline axes: all ranks must draw the iterator to its end. One parameter is
    whole at a time. A tied head is not yielded. `value_of` says what a rank's parameter is taken to be, of its dtype
    and shape (`lora.merging`); adapters by themselves are not yielded.
    """
    local = {placed.key: parameter for placed, parameter in _local_parameters(chunks, architecture).items()}
    owners = _owners({key: parameter.dtype for key, parameter in local.items()}, topology)
    for placed in placed_entries(architecture):
        owner, dtype = owners[placed.key]
        if topology.pipeline.rank == owner:
            parameter = local.get(placed.key)
            value = None if parameter is None else value_of(parameter)
            tensors = _whole_of_stage(placed, value, dtype, architecture, topology)
        else:
            tensors = [torch.empty(shape, dtype=dtype, device=topology.device) for shape in placed.entry.shapes]
        for name, tensor in zip(placed.hf, tensors, strict=True):
            whole = tensor.contiguous()
            if topology.pipeline.size > 1:
                ranks = dist.get_process_group_ranks(topology.pipeline.group)
                dist.broadcast(whole, src=ranks[owner], group=topology.pipeline.group)
            yield name, whole


def _whole_of_stage(
    placed: Placed, local: Tensor | None, dtype: torch.dtype, architecture: Architecture, topology: Topology
) -> list[Tensor]:
    """Whole tensors on every rank of the stage: gathered over the shards, and an expert's sent on by its own rank."""
    if local is not None:
        tensors = placed.entry.mapping.to_hf(_gather(local.data, _cut(placed, topology)))
    else:
        tensors = [torch.empty(shape, dtype=dtype, device=topology.device) for shape in placed.entry.shapes]
    if placed.entry.expert is None or topology.expert.size == 1:
        return tensors
    assert architecture.experts is not None
    owner = placed.entry.expert * topology.expert.size // architecture.experts.count
    tensors = [tensor.contiguous() for tensor in tensors]
    for tensor in tensors:
        dist.broadcast(tensor, src=dist.get_global_rank(topology.expert.group, owner), group=topology.expert.group)
    return tensors


def _cut(placed: Placed, topology: Topology) -> Axis:
    """Where a parameter's shards lie."""
    return topology.tensor if placed.entry.expert is None else topology.expert_tensor


def _replicas(placed: Placed, topology: Topology) -> Axis:
    """Where the same shard lies."""
    return topology.data_context if placed.entry.expert is None else topology.expert_data


def _gather(parameter: Tensor, axis: Axis) -> list[Tensor]:
    if axis.size == 1:
        return [parameter]
    shards = [torch.empty_like(parameter) for _ in range(axis.size)]
    dist.all_gather(shards, parameter.contiguous(), group=axis.group)
    return shards


def _owners(
    local: dict[tuple[str, int], torch.dtype], topology: Topology
) -> dict[tuple[str, int], tuple[int, torch.dtype]]:
    """The first pipeline stage that holds each parameter, and its dtype there."""
    shares = exchange.gather_all(local, topology.expert.group)
    of_stage = {key: dtype for share in shares for key, dtype in share.items()}
    stages = exchange.gather_all(of_stage, topology.pipeline.group)
    owners: dict[tuple[str, int], tuple[int, torch.dtype]] = {}
    for stage, held in enumerate(stages):
        for key, dtype in held.items():
            owners.setdefault(key, (stage, dtype))
    return owners


def _local_parameters(chunks: Sequence[Any], architecture: Architecture) -> dict[Placed, Tensor]:
    """This rank's parameters, those of adapters left out, by table entry and the model's own layer number.

    Raises ConversionError on a parameter that the table does not know.
    """
    spelled: dict[str, Entry] = {name: entry for entry in name_table(architecture) for name in entry.megatron}
    found: dict[Placed, Tensor] = {}
    for chunk in chunks:
        module = unwrap(chunk)
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                continue
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
            held = module.decoder.layers[int(match[1])] if match else None
            entry = spelled.get(f"decoder.layers.{{layer}}.{_in_model(match[2], held)}" if match else name)
            if entry is None:
                raise ConversionError(f"the model has a parameter {name} that no Hugging Face name is known for")
            layer = int(held.layer_number) - 1 if held is not None else -1
            found[Placed(entry=entry, layer=layer)] = parameter
    return found


def _in_model(name: str, layer: Any) -> str:
    """A layer's name of a parameter, with an expert's number in the model in place of that on this rank."""
    match = _EXPERT.fullmatch(name)
    return f"{match[1]}{layer.mlp.local_expert_indices[int(match[2])]}{match[3]}" if match else name


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside Megatron's data-parallel and precision wrappers."""
    while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
