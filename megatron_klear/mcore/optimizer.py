"""Megatron's optimizer for our chunks, its learning rate as a pure function of the step, and a guarded step.

Megatron's DistributedOptimizer over torch's AdamW (neither transformer-engine nor Apex installed, GPU or not)
mishandles AdamW's `step` tensors; `TorchDistributedOptimizer` mends that. Without it bias correction is wrong after
every resume, in silence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_klear.config.base import OptimizerConfig, RunConfig
from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore import host_optimizer
from megatron_klear.mcore.model import DTYPES

device_shim.install()

import megatron.core.optimizer as megatron_optimizer  # noqa: E402  (the shim must come first)
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402


class TorchDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer over torch's AdamW: `step` is kept right through save and load, and one kernel does a step.

    torch's default goes over memory a dozen times a step, and on CUDA makes temporaries as large as all parameters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.optimizer is not None:
            self._create_state()

    def _create_state(self) -> None:
        """Give AdamW its state now: Megatron's state_dict reads it, and AdamW makes it at the first step.

        The fused kernel wants `step` on the device of the parameter.
        """
        for group in self.optimizer.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        """Set one parameter's state; its `step` was set from the parameter group and is not per-element state."""
        group_index, group_order = self.model_param_group_index_map[model_param]
        parameter = self.optimizer.param_groups[group_index]["params"][group_order]
        step = self.optimizer.state[parameter]["step"]
        super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": step})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, then give every parameter a `step` of its own; Megatron shares one, counted up once a parameter."""
        super().load_state_dict(state_dict)
        for parameter, state in self.optimizer.state.items():
            if "step" in state:
                state["step"] = state["step"].to(parameter.device, copy=True)


def build_optimizer(run: RunConfig, chunks: list[DistributedDataParallel], overlap: bool) -> Any:
    """Megatron's optimizer over the chunks (a ChainedOptimizer).

    Raises RuntimeError when `optimizer.implementation = "fused"` and no fused Adam imports.
    """
    settings = run.optimizer
    plain_torch = bool(megatron_optimizer.USING_PYTORCH_OPTIMIZER)
    if settings.implementation == "fused" and plain_torch:
        raise RuntimeError(
            'optimizer.implementation = "fused" but neither transformer_engine nor NVIDIA Apex imports; '
            'install one of them or use "auto"'
        )
    if settings.implementation == "torch" and not plain_torch:
        raise RuntimeError('optimizer.implementation = "torch" but Megatron found a fused Adam and uses it; use "auto"')
    offloads = settings.cpu_offload > 0
    # The factory looks classes up by its globals; another engine of this process may have set them.
    megatron_optimizer.DistributedOptimizer = TorchDistributedOptimizer if plain_torch else DistributedOptimizer
    dtype = DTYPES[run.model.dtype]
    config = megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.distributed,
        overlap_param_gather=overlap and settings.distributed,
        optimizer_cpu_offload=offloads,
        optimizer_offload_fraction=settings.cpu_offload,
    )
    if offloads:
        host_optimizer.prepare(config)
    return megatron_optimizer.get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a checkpoint's optimizer state, whichever implementation of Adam wrote it.

    Parameter groups are replaced by those of the checkpoint, which lack the options of another implementation.
    """
    _translate_steps(state)
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update({key: value for key, value in options.items() if group.get(key) is None})


def _translate_steps(state: dict[str, Any]) -> None:
    """Put the count of steps where this Adam has it: torch's in each parameter's state, fused ones in the group.

    Of optimizers that are not distributed; Megatron does as much for the others.
    """
    for value in list(state.values()):
        if isinstance(value, dict):
            _translate_steps(value)
    if not {"state", "param_groups"} <= state.keys():
        return
    states, groups = state["state"], state["param_groups"]
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER and "common_step" not in states:
        steps = [group.pop("step") for group in groups if "step" in group]
        if steps:
            states["common_step"] = torch.tensor(float(steps[0]))
    elif not megatron_optimizer.USING_PYTORCH_OPTIMIZER and "common_step" in states:
        step = int(states.pop("common_step"))
        for group in groups:
            group["step"] = step


def learning_rate(settings: OptimizerConfig, step: int, total_steps: int | None) -> float:
    """The rate of optimizer step `step` (the first is 0): linear warm-up, then decay to the minimum.

    The minimum is reached where the run ends, after its last step, as in Megatron's and transformers' schedules: with a
    minimum of 0 the last step would move nothing otherwise.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay == "constant" or total_steps is None:
        return settings.learning_rate
    span = max(total_steps - settings.warmup_steps, 1)
    progress = min(max(step - settings.warmup_steps, 0) / span, 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if settings.decay == "cosine" else 1 - progress
    return settings.min_learning_rate + (settings.learning_rate - settings.min_learning_rate) * remaining


def set_rates(optimizer: Any, rate: float, weight_decay: float) -> None:
    """Write the step's learning rate and weight decay into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def guarded_step(optimizer: Any, loss: float, clip_grad: float) -> tuple[bool, float]:
    """Step unless the loss or the global gradient norm is not finite; returns (stepped, gradient norm before clipping).

    Megatron's own step would write NaN into every weight when the norm is not finite. The decision is the same on every
    rank because both numbers are.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return False, norm
    if clip_grad > 0:
        for part in optimizer.chained_optimizers:
            parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
            if parameters:
                decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8  # gradients beside `.grad`
                clip_grad_by_total_norm_fp32(parameters, clip_grad, norm, use_decoupled_grad=decoupled)
    optimizer.step_with_ready_grads()
    return True, norm
