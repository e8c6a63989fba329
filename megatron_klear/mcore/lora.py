"""LoRA on Megatron's column- and row-parallel linear layers: trained low-rank updates of frozen matrices.

An adapter belongs to one Hugging Face matrix W [out, in], also where Megatron fuses several: the layer computes
W x + (alpha / rank) B A x with A [rank, in] and B [out, rank] (Hu et al., arXiv 2106.09685, section 4.1). Where tensor
ranks cut the rows of W they cut those of B and each has the whole of A; where they cut its columns they cut those of A
and each has the whole of B.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_klear.config.base import LoraConfig
from megatron_klear.config.checks_lora import adapted_matrices
from megatron_klear.mcore import device as device_shim
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.names import Mapping, name_table
from megatron_klear.models.projections import Projection, projections

device_shim.install()

from megatron.core.tensor_parallel.layers import (  # noqa: E402  (the shim must come first)
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402

_MARK = ".lora."
_LAYERS = {
    "self_attention.linear_qkv": "rows",
    "self_attention.linear_proj": "columns",
    "mlp.linear_fc1": "rows",
    "mlp.linear_fc2": "columns",
}


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model, or an entry of its state, is of an adapter."""
    return _MARK in name


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What one of Megatron's weights is made of on a tensor rank, and which of it is adapted."""

    matrices: dict[str, Projection]
    """All that are fused in the weight, by name, with this tensor rank's shares as sizes."""
    adapted: tuple[str, ...]
    rank: int
    scale: float
    mapping: Mapping
    """Fuses the rows of the matrices."""


class Adapters(torch.nn.Module):
    """The adapters of one of Megatron's weights, as this tensor rank holds them: `q_proj_A`, `q_proj_B`, ..."""

    def __init__(self, form: Form, dtype: torch.dtype, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.form = form
        self.enabled = True
        options: dict[str, Any] = {"dtype": dtype, "device": torch.get_default_device()}
        for name in form.adapted:
            matrix = form.matrices[name]
            a = torch.nn.Parameter(torch.empty(form.rank, matrix.in_features, **options))
            b = torch.nn.Parameter(torch.zeros(matrix.out_features, form.rank, **options))
            cut, whole, axis = (b, a, 0) if matrix.cut == "rows" else (a, b, 1)
            set_tensor_model_parallel_attributes(cut, True, axis, 1)
            # Under sequence parallelism each tensor rank sees some tokens of what the whole factor works on.
            whole.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(f"{name}_A", a)
            self.register_parameter(f"{name}_B", b)

    def forward(self) -> tuple[Tensor, Tensor]:
        """All A one above the other [n * rank, in], and B [out of the fused weight, n * rank].

        One product each serves all matrices of the weight. A row of B is zero outside of its matrix's own columns.
        """
        form, count = self.form, len(self.form.adapted)
        down = torch.cat([self.get_parameter(f"{name}_A") for name in form.adapted])
        parts = []
        for name, matrix in form.matrices.items():
            if name in form.adapted:
                before = form.adapted.index(name) * form.rank
                own = self.get_parameter(f"{name}_B")
                parts.append(F.pad(own, (before, (count - 1) * form.rank - before)))
            else:
                parts.append(down.new_zeros(matrix.out_features, count * form.rank))
        return down, parts[0] if len(parts) == 1 else form.mapping.to_megatron(parts, 0, 1)

    def add(self, output: Tensor, low: Tensor, up: Tensor) -> Tensor:
        """`output` [..., out] + scale * up low, with low [..., n * rank]."""
        rows = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=self.form.scale)
        return rows.view(output.shape)

    def delta(self) -> Tensor:
        """This tensor rank's update of the fused weight, fp32."""
        down, up = self()
        return torch.mul(up.float() @ down.float(), self.form.scale)

    def shard_axes(self) -> dict[str, int]:
        """The axis along which tensor ranks cut each factor that they do."""
        cut = {"rows": ("B", 0), "columns": ("A", 1)}
        found = ((name, *cut[self.form.matrices[name].cut]) for name in self.form.adapted)
        return {f"lora.{name}_{factor}": axis for name, factor, axis in found}


class LoraColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel layer with adapters; subclasses say of what `form`."""

    form: Form

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = Adapters(self.form, self.config.params_dtype, sequence_parallel=self.sequence_parallel)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron's, and the update of its output."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.lora.enabled:
            return output, bias
        down, up = self.lora()
        low = F.linear(input_, down)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return self.lora.add(output, low, up), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Megatron's, with the adapters cut as they are."""
        return _sharded(self, {"weight": 0, "bias": 0}, prefix, sharded_offsets, metadata)


class LoraRowParallelLinear(RowParallelLinear):
    """A row-parallel layer with adapters; subclasses say of what `form`."""

    form: Form

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = Adapters(self.form, self.config.params_dtype, sequence_parallel=self.sequence_parallel)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Megatron's, and the update of its output."""
        output, bias = super().forward(input_)
        if not self.lora.enabled:
            return output, bias
        down, up = self.lora()
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        return self.lora.add(output, reduce(F.linear(input_, down), group=self.tp_group), up), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Megatron's, with the adapters cut as they are."""
        return _sharded(self, {"weight": 1}, prefix, sharded_offsets, metadata)


def _sharded(layer: Any, axes: dict[str, int], prefix: str, offsets: Any, metadata: Any) -> Any:
    return make_sharded_tensors_for_checkpoint(
        layer.state_dict(prefix="", keep_vars=True),
        prefix,
        axes | layer.lora.shard_axes(),
        offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )


def adapt_layers(
    block: TransformerBlockSubmodules, architecture: Architecture, settings: LoraConfig, tensor: int
) -> None:
    """Have the layers of a block built with adapters, for one of `tensor` tensor ranks."""
    forms = layer_forms(architecture, settings, tensor)
    for spec in {id(spec): spec for spec in block.layer_specs}.values():
        for place, form in forms.items():
            module, layer = place.split(".")
            holder = getattr(spec.submodules, module)
            # A ModuleSpec in megatron-core 0.16, for the MLP a functools.partial in 0.19.
            submodules = holder.keywords["submodules"] if hasattr(holder, "keywords") else holder.submodules
            base = LoraColumnParallelLinear if _LAYERS[place] == "rows" else LoraRowParallelLinear
            setattr(submodules, layer, type(base.__name__, (base,), {"form": form}))


def layer_forms(architecture: Architecture, settings: LoraConfig, tensor: int) -> dict[str, Form]:
    """The forms of Megatron's weights that have adapters, by their place in a layer."""
    share = dataclasses.replace(
        architecture,
        num_heads=architecture.num_heads // tensor,
        num_kv_heads=architecture.num_kv_heads // tensor,
        ffn_hidden_size=architecture.ffn_hidden_size // tensor,
    )
    targets, sizes, forms = adapted_matrices(settings, architecture), projections(share), {}
    for entry in name_table(share):
        place = entry.megatron[0].removeprefix("decoder.layers.{layer}.").removesuffix(".weight")
        if place not in _LAYERS:
            continue
        names = [name.split(".")[-2] for name in entry.hf]
        adapted = tuple(name for name in names if name in targets)
        if adapted:
            forms[place] = Form(
                matrices={name: sizes[name] for name in names},
                adapted=adapted,
                rank=settings.rank,
                scale=settings.alpha / settings.rank,
                mapping=entry.mapping,
            )
    return forms


def freeze(models: Sequence[Any], *, recompute: bool) -> None:
    """Leave the adapters alone to be trained, if there are any.

    With `recompute` the embedding's output asks for a gradient: a recomputed block makes none where no input does.
    """
    if not any(True for _ in layers_with_adapters(models)):
        return
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        if recompute and model.pre_process:
            model.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def layers_with_adapters(models: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The linear layers that have adapters, each with the number of its decoder layer in the whole model."""
    for model in models:
        for layer in model.decoder.layers:
            for module in layer.modules():
                if isinstance(module, LoraColumnParallelLinear | LoraRowParallelLinear):
                    yield int(layer.layer_number) - 1, module


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """A or B of one adapter on this rank."""

    matrix: str
    """Hugging Face name of the matrix, without `.weight`."""
    kind: Literal["A", "B"]
    parameter: torch.nn.Parameter
    axis: int | None
    """Along which tensor ranks cut it; None where each has the whole."""


def factors(models: Sequence[Any]) -> Iterator[Factor]:
    """Those of all adapters of this rank's chunks."""
    for layer, module in layers_with_adapters(models):
        axes = module.lora.shard_axes()
        for name in module.lora.form.adapted:
            matrix = f"model.layers.{layer}.{module.lora.form.matrices[name].module}.{name}"
            for kind in ("A", "B"):
                parameter = module.lora.get_parameter(f"{name}_{kind}")
                yield Factor(matrix=matrix, kind=kind, parameter=parameter, axis=axes.get(f"lora.{name}_{kind}"))


def merging(models: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """What the layers compute with, as one matrix: W + scale B A, summed in fp32 and rounded once to W's precision.

    Of a parameter without adapters it is the parameter.
    """
    adapters = {id(module.weight): module.lora for _, module in layers_with_adapters(models)}

    def merged(parameter: Tensor) -> Tensor:
        found = adapters.get(id(parameter))
        weight = parameter.detach()
        return weight if found is None else (weight.float() + found.delta()).to(weight.dtype)

    return merged


@torch.no_grad()
def fold(models: Sequence[Any]) -> None:
    """Put the updates into the frozen weights for good, and leave the adapters at zero."""
    for _, module in layers_with_adapters(models):
        module.weight.copy_(module.weight.float() + module.lora.delta())
        for name in module.lora.form.adapted:
            module.lora.get_parameter(f"{name}_B").zero_()


@contextlib.contextmanager
def adapters_off(models: Sequence[Any]) -> Iterator[None]:
    """Compute with the frozen weights alone inside the block."""
    adapters = [module.lora for _, module in layers_with_adapters(models)]
    for each in adapters:
        each.enabled = False
    try:
        yield
    finally:
        for each in adapters:
            each.enabled = True
