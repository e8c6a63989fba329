"""From the last stage's hidden states to the loss or the log-probs: the fused kernel, or its plain-torch reference.

The methods are what Megatron's schedule calls with the output of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_klear import kernels
from megatron_klear.config.base import ModelConfig
from megatron_klear.mcore.model import DTYPES, PolicyModel
from megatron_klear.mcore.rows import LocalRow
from megatron_klear.mcore.topology import Topology
from megatron_klear.models.architecture import Architecture
from megatron_klear.types import KLEstimator, TokenLoss

NUM_REGIONS = 5


class Head:
    """The vocabulary-parallel head and the loss behind it."""

    def __init__(self, model: ModelConfig, architecture: Architecture, topology: Topology) -> None:
        self._fused = model.fused_loss
        self._policy_loss = kernels.fused_policy_loss if model.fused_loss else kernels.fused_policy_loss_ref
        self._layout: dict[str, Any] = {
            "group": topology.tensor.group if topology.tensor.size > 1 else None,
            "vocab_size": architecture.vocab_size,
            "sequence_parallel": topology.sequence_parallel,
            "logits_dtype": torch.float32 if model.logits_dtype == "fp32" else DTYPES[model.dtype],
        }

    def loss(
        self,
        model: PolicyModel,
        row: LocalRow,
        hidden: Tensor,
        *,
        loss: TokenLoss,
        temperature: float,
        entropy_coefficient: float = 0.0,
        kl_coefficient: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        keep_ratios: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The row's summed loss, in Megatron's form: (loss, unused token count, sums to log).

        With `keep_ratios` the sums have `ratios` [T_local] beside them.
        """
        weight, values = model.head_weight, row.per_token
        inputs = kernels.PolicyLossInputs(
            hidden=hidden.squeeze(1),
            weight=weight,
            targets=values["targets"],
            loss=loss,
            policy_weights=values["weights"],
            old_logprobs=values.get("old_logprobs"),
            advantages=values.get("advantages"),
            nll_weights=values.get("nll_weights"),
            ref_logprobs=values.get("ref_logprobs"),
            temperature=temperature,
            entropy_coefficient=entropy_coefficient,
            kl_coefficient=kl_coefficient,
            kl_estimator=kl_estimator,
            chosen=self._choose(row.host, loss, bool(entropy_coefficient or kl_coefficient)).to(hidden.device)
            if self._fused
            else None,
            **_way_of_gradient(model),
            **self._layout,
        )
        result = self._policy_loss(inputs)
        sums = {
            "loss": result.loss.detach().float(),
            "entropy": torch.where(values["weights"] != 0, result.entropy, 0.0).sum(),
        }
        if "advantages" in values:
            trained = values["weights"] != 0
            for region in range(1, NUM_REGIONS + 1):
                sums[f"clip_region_{region}_tokens"] = ((result.region == region) & trained).sum().float()
        if keep_ratios:
            sums["ratios"] = result.ratio
        return result.loss, torch.zeros((), dtype=torch.int, device=hidden.device), sums

    def logprobs(
        self, model: PolicyModel, row: LocalRow, hidden: Tensor, *, temperature: float, non_loss_data: bool = True
    ) -> Tensor:
        """Log-probs [T_local] of the row's targets."""
        inputs = hidden.squeeze(1), model.head_weight, row.per_token["targets"]
        if self._fused:
            chosen = kernels.choose_all(row.host["targets"], self._layout["vocab_size"]).to(hidden.device)
            return kernels.fused_logprobs(*inputs, chosen=chosen, temperature=temperature, **self._layout).logprobs
        return kernels.vocab_parallel_logprobs_ref(*inputs, temperature=temperature, **self._layout)[0]

    def _choose(self, host: Mapping[str, Tensor], loss: TokenLoss, other_terms: bool) -> kernels.Chosen:
        """The tokens that take part, from the row's numbers on the host: the device is not waited for."""
        return kernels.choose_tokens(
            host["targets"],
            host["weights"],
            vocab_size=self._layout["vocab_size"],
            coefficients=loss.coefficients(),
            advantages=host.get("advantages"),
            nll_weights=host.get("nll_weights"),
            other_terms=other_terms,
        )


def _way_of_gradient(model: PolicyModel) -> dict[str, Any]:
    """Where the head's gradient goes; a frozen head has none, and none is computed."""
    weight = model.head_weight
    if not weight.requires_grad:
        return {"main_grad": None, "weight_grad": "autograd"}
    # A head that is also this chunk's embedding gets a second gradient through autograd.
    mode = "main_grad_tied" if model.head_is_embedding else "main_grad"
    return {"main_grad": weight.main_grad, "weight_grad": mode}  # type: ignore[attr-defined]  # Megatron's DDP puts it there
