"""A stand-in for NVIDIA Apex's FusedAdam in this process: import before Megatron is.

Signature, parameter groups and state are those of apex/optimizers/fused_adam.py: a count of steps in each group,
moments in fp32 beside parameters of any type. The kernel is `te_functions.multi_tensor_adam`, which is Apex's too.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import te_functions
import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """`apex.optimizers.FusedAdam`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if capturable or master_weights:
            raise NotImplementedError("the stand-in steps parameters as they are")
        options = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, options | {"weight_decay": weight_decay})
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none = set_grad_none

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            lists: list[list[Tensor]] = [[], [], [], []]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                for one, tensor in zip(
                    lists, (parameter.grad, parameter, state["exp_avg"], state["exp_avg_sq"]), strict=True
                ):
                    one.append(tensor)
            te_functions.multi_tensor_adam(
                65536,
                torch.zeros(1, dtype=torch.int32),
                lists,
                group["lr"],
                *group["betas"],
                group["eps"],
                group["step"],
                self.adam_w_mode,
                1 if group["bias_correction"] else 0,
                group["weight_decay"],
            )


class FusedSGD(torch.optim.SGD):
    """`apex.optimizers.FusedSGD`, which Megatron imports beside it."""


apex: Any = types.ModuleType("apex")
apex.__path__ = []  # a package, of which there is this much
optimizers: Any = types.ModuleType("apex.optimizers")
optimizers.FusedAdam, optimizers.FusedSGD = FusedAdam, FusedSGD
apex.optimizers = optimizers
sys.modules |= {"apex": apex, "apex.optimizers": optimizers}

from megatron_klear.mcore import device  # noqa: E402  (Megatron is first imported here)

device.install()
