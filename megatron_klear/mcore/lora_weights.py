"""Adapters filled from a seed or from PEFT's files, and given out under PEFT's names, in any layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_klear.config.base import LoraConfig
from megatron_klear.distributed import exchange
from megatron_klear.mcore.lora import Factor, factors
from megatron_klear.mcore.weights import generator_of, iter_hf_weights
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.peft import WEIGHTS_FILE, AdapterError, tensor_name
from megatron_klear.models.safetensors_io import read_header

if TYPE_CHECKING:
    from megatron_klear.mcore.topology import Topology

Source = Callable[[str, tuple[int, ...]], Tensor]
"""A whole tensor by PEFT's name and its shape."""


def start_adapters(models: Sequence[Any], settings: LoraConfig, seed: int, topology: Topology) -> None:
    """Fill the adapters with what a run starts from: `settings.adapter`, or A drawn from the seed and B zero.

    A is uniform within 1 / sqrt(in), PEFT's Kaiming initialisation with a = sqrt(5), whatever the layout.
    Collective. Raises AdapterError where the folder's tensors are not those of the adapters.
    """
    if settings.adapter is not None:
        load_adapters(models, settings.adapter, topology)
        return

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(".lora_B.weight"):
            return torch.zeros(shape)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(seed, name))

    _fill(models, topology, draw)


def load_adapters(models: Sequence[Any], folder: Path, topology: Topology) -> None:
    """Read PEFT's `adapter_model.safetensors` into the adapters. Collective; raises AdapterError, the same on all."""
    shapes = _whole_shapes(models, topology)
    path = Path(folder) / WEIGHTS_FILE
    tensors = exchange.same_outcome(lambda: _read(path, shapes))
    _fill(models, topology, lambda name, _shape: tensors[name])


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"{path} does not exist: an adapter's weights must be safetensors (PEFT's default)")
    found = {spec.name: spec.shape for spec in read_header(path)}
    wrong = sorted(found.keys() ^ shapes.keys())
    if wrong:
        where = "lacks" if wrong[0] in shapes else "holds"
        raise AdapterError(f"{path} {where} {wrong[0]}, and {len(wrong)} tensors in all are on one side only")
    for name, shape in shapes.items():
        if found[name] != shape:
            raise AdapterError(f"{path}: {name} has shape {found[name]}, this model and lora.rank make it {shape}")
    return load_file(path)


@torch.no_grad()
def _fill(models: Sequence[Any], topology: Topology, source: Source) -> None:
    for factor in factors(models):
        whole = source(tensor_name(factor.matrix, factor.kind), _whole_shape(factor, topology))
        part = whole if factor.axis is None else whole.chunk(topology.tensor.size, factor.axis)[topology.tensor.rank]
        factor.parameter.copy_(part)


def _whole_shape(factor: Factor, topology: Topology) -> tuple[int, ...]:
    shape = list(factor.parameter.shape)
    if factor.axis is not None:
        shape[factor.axis] *= topology.tensor.size
    return tuple(shape)


def _whole_shapes(models: Sequence[Any], topology: Topology) -> dict[str, tuple[int, ...]]:
    """Of all tensors over all pipeline stages, by PEFT's name."""
    own = {tensor_name(each.matrix, each.kind): _whole_shape(each, topology) for each in factors(models)}
    stages = exchange.gather_all(own, topology.pipeline.group)
    return {name: shape for stage in stages for name, shape in stage.items()}


@torch.no_grad()
def iter_adapters(models: Sequence[Any], topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """Every factor under PEFT's name, whole, on every rank, in the order of layers.

    Collective over the tensor and pipeline axes: all ranks must draw the iterator to its end.
    """
    own = {tensor_name(each.matrix, each.kind): each for each in factors(models)}
    stages = exchange.gather_all(
        {name: (_whole_shape(each, topology), each.parameter.dtype) for name, each in own.items()},
        topology.pipeline.group,
    )
    ranks = dist.get_process_group_ranks(topology.pipeline.group)
    held = [(name, stage, *form) for stage, forms in enumerate(stages) for name, form in forms.items()]
    for name, stage, shape, dtype in sorted(held, key=lambda each: _layer(each[0])):
        if name in own:
            whole = _gathered(own[name], topology)
        else:
            whole = torch.empty(shape, dtype=dtype, device=topology.device)
        if topology.pipeline.size > 1:
            dist.broadcast(whole, src=ranks[stage], group=topology.pipeline.group)
        yield name, whole


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _gathered(factor: Factor, topology: Topology) -> Tensor:
    own = factor.parameter.detach().contiguous()
    if factor.axis is None or topology.tensor.size == 1:
        return own.clone()
    shards = [torch.empty_like(own) for _ in range(topology.tensor.size)]
    dist.all_gather(shards, own, group=topology.tensor.group)
    return torch.cat(shards, factor.axis)


def base_checksum(models: Sequence[Any], architecture: Architecture, topology: Topology) -> str:
    """SHA-256 over names, types and bytes of the frozen weights, the same in every layout. Collective.

    Adapters are left out. It reads the whole model once: some 10 s for 8 billion parameters.
    """
    digest = hashlib.sha256()
    for name, whole in iter_hf_weights(models, architecture, topology):
        if topology.rank == 0:
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
            digest.update(whole.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return exchange.tell_all(digest.hexdigest())
