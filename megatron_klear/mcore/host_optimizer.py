"""The share of the optimizer that is kept and stepped in host memory (`optimizer.cpu_offload`).

Of an offloaded parameter's shard the host holds the fp32 master, both moments and a pinned copy of the gradient, 16
bytes a parameter; the card holds the bf16 weight and its gradient buffer and nothing else. What is not offloaded has
its 12 bytes of master and moments on the card.

Megatron's HybridDeviceOptimizer does the stepping. By itself (0.16.1 and 0.19.2 alike) it

- copies the whole unsharded model once, before DistributedOptimizer makes it anew over this rank's shards;
- has no state before the first step, so that nothing can be saved, or loaded into, then; Megatron's way out is a step
  on random gradients, which moves the weights in use;
- hands fp32 weights that stay on the card no gradient, and cannot load them: `config.checks` asks for bf16;
- sends the state of the card's share to the host after a load, where both shares use torch's AdamW;
- keeps what it loads as views of whole unsharded tensors, beside the masters it steps.

The classes here mend these. **They have been run with a card emulated on a CPU (tests/emulated_card.py), never on a
real one.**
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_klear.config.base import RunConfig
from megatron_klear.config.checks import offload_problems
from megatron_klear.errors import UserError
from megatron_klear.mcore import device as device_shim

device_shim.install()

import megatron.core.optimizer as megatron_optimizer  # noqa: E402  (the shim must come first)
import megatron.core.optimizer.distrib_optimizer as distrib_optimizer  # noqa: E402
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

_OF_THE_RUN = {
    *("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32"),
    *("pin_cpu_grads", "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d"),
}


class HostAdamW(torch.optim.AdamW):
    """AdamW of the host's share. A class of its own, as Megatron tells the shares apart by theirs."""


class HostOptimizer(HybridDeviceOptimizer):
    """AdamW of which a share lies in host memory; saves and loads at any time, in any layout, with any share."""

    def __init__(self, params: Any, **options: Any) -> None:
        # One AdamW on both sides, whatever fused ones are installed: the share is no matter of arithmetic then.
        options |= {"cpu_optimizer_cls": HostAdamW, "gpu_optimizer_cls": torch.optim.AdamW}
        super().__init__(params, **options)

    def _init_sub_optimizers(self) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(isinstance(parameter, torch.nn.Parameter) for parameter in parameters):
            # Megatron's first instance, over the whole model; its only use is to say what the one over shards is like.
            self.cpu_optimizers: list[torch.optim.Optimizer] = []
            self.gpu_optimizer: torch.optim.Optimizer | None = None
            return
        super()._init_sub_optimizers()
        self._create_state()

    def _create_state(self) -> None:
        """Give every parameter its moments where it is stepped: on the host those of what is offloaded."""
        for optimizer in self.sub_optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = {
                        "step": parameter.new_zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        if not self.state:
            self._sync_sub_optimizers_state_to_hdo()

    @torch.no_grad()
    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Copy what was loaded into the tensors that are stepped, and show those as the state.

        `step` gets a tensor for each parameter: torch counts each up, and Megatron loads one for all.
        """
        for optimizer in self.sub_optimizers:
            for inner, state in optimizer.state.items():
                loaded = self.state[self.inner_param_to_orig_param[inner]]
                for name in ("step", "exp_avg", "exp_avg_sq"):
                    if state[name] is not loaded[name]:
                        state[name].copy_(loaded[name])
                if loaded["master_param"] is not inner:
                    inner.copy_(loaded["master_param"])
        self._sync_sub_optimizers_state_to_hdo()

    def state_dict(self) -> dict[str, Any]:
        """Torch's, without what only says how this run shares its memory: another may do so otherwise."""
        whole = super().state_dict()
        groups = [{k: v for k, v in group.items() if k not in _OF_THE_RUN} for group in whole["param_groups"]]
        return {**whole, "param_groups": groups}


class HostDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer over `HostOptimizer`: loads into the tensors that are there."""

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][group_order]]
        for name, tensor in tensors.items():
            state["master_param" if name == "param" else name].copy_(tensor)


def prepare(config: Any) -> None:
    """Have Megatron's factory make the classes above, from an OptimizerConfig that this completes."""
    # The factory looks both up by these globals.
    megatron_optimizer.HybridDeviceOptimizer = distrib_optimizer.HybridDeviceOptimizer = HostOptimizer
    megatron_optimizer.DistributedOptimizer = HostDistributedOptimizer
    # Without the flag gradients and masters of offloaded parameters stay on the card. It is set late, as its check
    # compares the version of transformer-engine, which need not be installed (TypeError in 0.16.1).
    config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    config.store_param_remainders = False


def check_offload(run: RunConfig, device: torch.device) -> None:
    """Raise UserError where `optimizer.cpu_offload` cannot do what it says; where a GPU is, only torch knows."""
    if problems := offload_problems(run):
        raise UserError(problems[0])
    if run.optimizer.cpu_offload > 0 and not torch.empty(0, device=device).is_cuda:
        raise UserError(
            f"optimizer.cpu_offload = {run.optimizer.cpu_offload:g} moves optimizer state from a GPU to host memory, "
            "and this run has no GPU; set it to 0"
        )


def host_bytes(optimizer: Any) -> int:
    """Bytes of masters and moments that an engine's optimizer keeps in host memory, gradients' copies not counted."""
    sizes: dict[int, int] = {}
    for part in optimizer.chained_optimizers:
        if isinstance(getattr(part, "optimizer", None), HostOptimizer):
            states = [state for sub in part.optimizer.cpu_optimizers for state in sub.state.values()]
            tensors = [state[name] for state in states for name in ("master_param", "exp_avg", "exp_avg_sq")]
            sizes |= {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())
