"""Mixtures of experts in Megatron's layers: options, a router that balances and counts in our terms, metrics.

Megatron's auxiliary losses are means over whatever lies in a micro-batch, so that packing and micro-batching change
them. Here both losses are of a sequence: the mean over its own tokens, prompt included and padding not, and it weighs
in the step what the sequence's tokens weigh in the policy loss together. Those weights sum to one over the global
batch, so the losses are the same in every layout and packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.config.base import ModelConfig
from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore.rows import RowParams
from megatron_klear.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron_klear.mcore.topology import Topology

device_shim.install()

from megatron.core import tensor_parallel  # noqa: E402  (the shim must come first)
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # 0.16.1 reads it without transformer-engine too, and does not set it then

_SUMS = ("tokens", "entropy", "moe_aux_loss", "moe_z_loss", "routes", "route_mismatch")


def expert_options(architecture: Architecture, topology: Topology) -> dict[str, Any]:
    """What Megatron's configuration is told of the experts."""
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.chosen,
        # Softmax over the chosen logits is softmax over all divided by the sum of the chosen.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # `Router` does it
        "expert_model_parallel_size": topology.expert.size,
        "expert_tensor_parallel_size": topology.expert_tensor.size,
    }


def route(spec: ModuleSpec, model: ModelConfig) -> None:
    """Put our layer and router into a specification of Megatron's layer with experts."""
    router = partial(Router, aux_loss=model.moe_aux_loss, z_loss=model.moe_z_loss)
    spec.module, mlp = RoutedLayer, spec.submodules.mlp
    if isinstance(mlp, partial):  # 0.17 and newer
        spec.submodules.mlp = partial(mlp, submodules=replace(mlp.keywords["submodules"], router=router))
    else:
        mlp.submodules = replace(mlp.submodules, router=router)


def mark_experts(chunk: torch.nn.Module) -> None:
    """Say of expert parameters what Megatron says only where experts are shared out, or not at all.

    Otherwise optimizer state would have another form at expert parallelism 1 and could not be resharded, 0.16.1 would
    sum gradients of whole experts over tensor ranks wrongly, without an error (expert_tensor = 1, expert = 1), and
    matrices of its grouped layers would fall out of the gradient norm on all tensor ranks but the first.
    """
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]  # but over the expert-data axis
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


class Router(TopKRouter):
    """Megatron's router, with the two losses of a sequence and with sums for the metrics."""

    def __init__(self, *args: Any, aux_loss: float, z_loss: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.row: RowParams | None = None
        self._aux_loss, self._z_loss = aux_loss, z_loss
        self.sums: Tensor | None = None  # [experts + len(_SUMS)] float64, since the last `routing_metrics`

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Probabilities and choice [T_rank, experts] of logits [T_rank, 1, experts]; losses hang on the former."""
        assert self.row is not None, "RoutedLayer says which row is under way"
        probabilities, chosen, compared = self._choose(logits, *args, **kwargs)
        if not self.training:
            return probabilities, chosen
        assert self.row.sequences is not None
        sequences = self.row.sequences.shard(self.tp_group.rank(), self.tp_group.size())
        logits = logits.view(-1, self.num_experts).float()
        weights = sequences.weights / sequences.lengths  # of one token
        loss, parts = logits.new_zeros(()), [logits.new_zeros(())] * 2
        if self._aux_loss:
            parts[0] = self._balance(logits, chosen, sequences.of_token, sequences.lengths, weights)
            loss = loss + self._aux_loss * parts[0]
        if self._z_loss:
            parts[1] = (weights[sequences.of_token] * logits.logsumexp(-1).square()).sum()
            loss = loss + self._z_loss * parts[1]
        # Under recomputation a row passes twice, the first time without gradients.
        if torch.is_grad_enabled() is not repeats_experts(self.config):
            self._count(logits.detach(), chosen, weights[sequences.of_token] != 0, parts, compared)
        if loss.requires_grad:
            probabilities = MoEAuxLossAutoScaler.apply(probabilities, loss)
        return probabilities, chosen

    def _choose(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Probabilities and choice, those of an earlier pass or of the sampler where the row has them.

        Under the sampler's also which tokens have routes of it, and which of those would have gone elsewhere
        [2, T_rank]; this router chooses among the same inputs as the sampler's, for layers before are replayed too.
        """
        assert self.row is not None
        routes, sampler_routes, layer = self.row.routes, self.row.sampler_routes, self.layer_number
        if routes is not None and layer in routes:
            return *self._replay(logits.view(-1, self.num_experts), routes[layer].long()), None
        probabilities, chosen = super().routing(logits, *args, **kwargs)
        if routes is not None:
            routes[layer] = chosen.nonzero()[:, 1].view(-1, self.topk).to(torch.int16)
        if sampler_routes is None:
            return probabilities, chosen, None
        sampled = sampler_routes[:, layer - 1].chunk(self.tp_group.size())[self.tp_group.rank()].long()
        has_routes = sampled[:, 0] >= 0
        own = chosen.int().topk(self.topk, dim=1).indices  # unlike nonzero, waits for no device
        choice = torch.where(has_routes[:, None], sampled, own)
        probabilities, replayed = self._replay(logits.view(-1, self.num_experts), choice)
        return probabilities, replayed, torch.stack([has_routes, has_routes & (replayed & ~chosen).any(1)])

    def _replay(self, logits: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        """What Megatron's routing gives of logits [T_rank, experts] where the choice [T_rank, topk] is made already."""
        if self.config.moe_router_pre_softmax:
            weights = logits.softmax(-1, dtype=torch.float32).gather(1, choice)
        else:
            weights = logits.gather(1, choice).softmax(-1, dtype=torch.float32)
        nothing = torch.zeros_like(logits)
        return nothing.scatter(1, choice, weights.to(logits.dtype)), nothing.bool().scatter(1, choice, True)

    def _balance(self, logits: Tensor, chosen: Tensor, of_token: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
        """This rank's part of sum_s W_s * E / k * sum_e f_se P_se.

        f_se is the choices that fell on expert e over the sequence's tokens, P_se its mean probability (Fedus et al.,
        arXiv 2101.03961, eq. 4 to 6, over a sequence as in DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20): one where all
        are equally liked. Choices are counted over all shards of the row, and have no gradient.
        """
        counts = logits.new_zeros(len(lengths), self.num_experts).index_add_(0, of_token, chosen.to(logits.dtype))
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        liked = counts * (self.num_experts / self.topk * weights / lengths)[:, None]
        part: Tensor = (logits.softmax(-1) * liked[of_token]).sum()
        return part

    @torch.no_grad()
    def _count(
        self, logits: Tensor, chosen: Tensor, counted: Tensor, losses: Sequence[Tensor], compared: Tensor | None
    ) -> None:
        """Add a row's tokens of sequences that have a weight."""
        log_probabilities = logits.log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        routes = logits.new_zeros(2) if compared is None else (compared & counted).sum(1)
        of_row = [counted.sum(), (entropy * counted).sum(), *(loss.detach() for loss in losses), *routes]
        sums = torch.cat([(chosen & counted[:, None]).sum(0).double(), torch.stack([one.double() for one in of_row])])
        self.sums = sums if self.sums is None else self.sums + sums


def repeats_experts(config: Any) -> bool:
    """Whether the forward pass of experts and their router is repeated in the backward pass."""
    granularity, modules = config.recompute_granularity, config.recompute_modules or ()
    return granularity == "full" or (granularity == "selective" and "mlp" in modules)


class RoutedLayer(TransformerLayer):
    """Megatron's layer, whose router knows the row; under selective recomputation all after the attention is repeated.

    A row is bound to the pass that it is recomputed in: other micro-batches go by in between.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's arguments; `packed_seq_params` are the row's RowParams."""
        self._row = kwargs["packed_seq_params"]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._row = None

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        row, forward = self._row, super()._forward_mlp

        def run(hidden_states: Tensor) -> Any:
            self.mlp.router.row = row
            try:
                return forward(hidden_states, *args, **kwargs)
            finally:
                self.mlp.router.row = None

        if self.training and self.config.recompute_granularity == "selective" and repeats_experts(self.config):
            return tensor_parallel.checkpoint(run, False, hidden_states)
        return run(hidden_states)


def routing_metrics(models: Sequence[torch.nn.Module], run: ModelConfig, topology: Topology) -> dict[str, float]:
    """Means over layers of what the routers have summed since the last call, over all ranks; collective.

    `moe_load_max` and `moe_load_min` are the tokens of the most and the least liked expert over the mean,
    `moe_router_entropy` is in nats, the losses are before their weights in the settings. Where the sampler's routes are
    replayed, `moe_route_mismatch` is the share of tokens that would have gone elsewhere, layers before being replayed.
    """
    routers = [module for model in models for module in model.modules() if isinstance(module, Router)]
    if not routers:
        return {}
    sums = torch.stack([router.sums for router in routers if router.sums is not None])
    for router in routers:
        router.sums = None
    for axis in (topology.tensor, topology.data_context):
        if axis.size > 1:
            dist.all_reduce(sums, group=axis.group)
    loads, last = sums[:, : -len(_SUMS)], sums[:, -len(_SUMS) :]
    tokens, entropy, aux_loss, z_loss, routes, mismatch = last.unbind(1)
    tokens = tokens.clamp(min=1.0)
    mean = loads.mean(1).clamp(min=1e-9)
    of_layers = [loads.amax(1) / mean, loads.amin(1) / mean, entropy / tokens, aux_loss, z_loss]
    of_layers += [mismatch / routes.clamp(min=1.0), routes]
    totals = topology.all_reduce([float(len(routers)), *torch.stack(of_layers).sum(1).tolist()], topology.pipeline)
    names = ("moe_load_max", "moe_load_min", "moe_router_entropy", "moe_aux_loss", "moe_z_loss", "moe_route_mismatch")
    found = {name: total / totals[0] for name, total in zip(names, totals[1:-1], strict=True)}
    if not totals[-1]:
        del found["moe_route_mismatch"]
    weights = {"moe_aux_loss": run.moe_aux_loss, "moe_z_loss": run.moe_z_loss}
    return {name: value for name, value in found.items() if weights.get(name, 1.0)}
