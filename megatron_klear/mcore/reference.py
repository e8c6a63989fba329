"""The frozen model that a KL is measured against, in the place of the one in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klear.mcore.lora import adapters_off
from megatron_klear.mcore.model import PolicyModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Weights in host memory, or none where the reference is the base that adapters are trained on."""

    models: Sequence[PolicyModel]
    values: list[Tensor]
    """Of all parameters of the models; empty for the base."""
    adapted: bool
    """Whether the models' adapters are part of it."""

    @classmethod
    def keep(cls, models: Sequence[PolicyModel], load: Callable[[], None] | None, *, is_base: bool) -> Reference:
        """The models as they are, or as `load` makes them, which are put back; `is_base` is their base itself.

        What is loaded are whole models: adapters are no part of it.
        """
        if is_base:
            return cls(models=models, values=[], adapted=False)
        present = _copies(models)
        if load is not None:
            load()
        # A copy on the CPU as well, where .cpu() would be the very weights in training.
        values = [parameter.detach().to("cpu", copy=True) for model in models for parameter in model.parameters()]
        _put(models, present)
        return cls(models=models, values=values, adapted=load is None)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the models compute as the reference inside the block."""
        with contextlib.ExitStack() as stack:
            if self.values:
                stack.callback(_put, self.models, _copies(self.models))
                _put(self.models, self.values)
            if not self.adapted:
                stack.enter_context(adapters_off(self.models))
            yield


def _copies(models: Sequence[PolicyModel]) -> list[Tensor]:
    return [parameter.detach().clone() for model in models for parameter in model.parameters()]


@torch.no_grad()
def _put(models: Sequence[PolicyModel], weights: Sequence[Tensor]) -> None:
    parameters = [parameter for model in models for parameter in model.parameters()]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
