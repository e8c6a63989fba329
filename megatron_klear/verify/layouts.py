"""The same numbers in every layout: run one set of samples through many layouts and compare with one process.

Each layout starts from the same weights, computes the log-probs of every sample, and takes a few optimizer steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from megatron_klear.config.base import ParallelConfig, RecomputedModule, SFTConfig
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.data.sft import SampleStore
from megatron_klear.distributed import exchange
from megatron_klear.errors import UserError
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import Topology, seed_everything, world
from megatron_klear.models.architecture import Architecture
from megatron_klear.rl.losses import GPPO, NLL
from megatron_klear.types import PackedBatch, Sample, TokenLoss

LossName = Literal["nll", "gppo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to run the samples. `data` is the number of data-parallel replicas."""

    name: str
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    """Taken from the tensor, context and data axes."""
    expert_tensor: int | None = None
    sequence: bool = False
    overlap: bool = False
    sequences_per_row: int = 2
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[RecomputedModule, ...] = ("core_attn", "mlp")
    recompute_method: Literal["uniform", "block"] = "uniform"
    fused: bool | None = None
    """Overrides `model.fused_loss`."""

    @property
    def processes(self) -> int:
        """Processes the layout takes."""
        return self.tensor * self.pipeline * self.context * self.data

    def lay_out(self, config: SFTConfig) -> SFTConfig:
        """The run's settings laid over processes in this way, all else as it is."""
        parallel = ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            context=self.context,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            sequence=self.sequence,
            device=config.parallel.device,
            timeout_minutes=config.parallel.timeout_minutes,
        )
        return config.model_copy(update={"parallel": parallel})

    def apply(self, config: SFTConfig) -> SFTConfig:
        """The run's settings in this layout, with a constant learning rate."""
        optimizer = config.optimizer.model_copy(
            update={"overlap": self.overlap, "decay": "constant", "warmup_steps": 0}
        )
        model = config.model
        if self.fused is not None:
            model = model.model_copy(update={"fused_loss": self.fused})
        again = {"modules": self.recompute_modules, "method": self.recompute_method}
        recompute = config.recompute.model_copy(update={"granularity": self.recompute, **again})
        return self.lay_out(config).model_copy(update={"optimizer": optimizer, "model": model, "recompute": recompute})


ONE_PROCESS = Layout(name="one process")

LAYOUTS: tuple[Layout, ...] = (
    ONE_PROCESS,
    Layout(name="1 sequence a row", sequences_per_row=1),
    Layout(name="4 sequences a row", sequences_per_row=4),
    Layout(name="full recompute", recompute="full"),
    Layout(name="selective recompute", recompute="selective"),
    Layout(name="norms recomputed", recompute="selective", recompute_modules=("layernorm", "core_attn")),
    Layout(name="TP2", tensor=2),
    Layout(name="TP2 SP", tensor=2, sequence=True),
    Layout(name="PP2", pipeline=2),
    Layout(name="PP2 VPP2", pipeline=2, virtual_pipeline=2),
    Layout(name="PP2 block recompute", pipeline=2, recompute="full", recompute_method="block"),
    Layout(name="CP2", context=2),
    Layout(name="CP2, 1 sequence a row", context=2, sequences_per_row=1),
    Layout(name="DP2", data=2),
    Layout(name="DP2 overlap", data=2, overlap=True),
    Layout(name="TP2 PP2 SP", tensor=2, pipeline=2, sequence=True),
    Layout(name="TP2 CP2 SP", tensor=2, context=2, sequence=True),
    Layout(name="PP2 CP2", pipeline=2, context=2),
    Layout(name="PP2 VPP2 DP2 overlap", pipeline=2, virtual_pipeline=2, data=2, overlap=True),
    Layout(name="TP2 PP2 CP2 SP", tensor=2, pipeline=2, context=2, sequence=True),
)


EXPERT_LAYOUTS: tuple[Layout, ...] = (
    ONE_PROCESS,
    Layout(name="1 sequence a row", sequences_per_row=1),
    Layout(name="4 sequences a row, full recompute", sequences_per_row=4, recompute="full"),
    Layout(name="selective recompute", recompute="selective"),
    Layout(name="norms recomputed", recompute="selective", recompute_modules=("layernorm", "core_attn")),
    Layout(name="DP2", data=2),
    Layout(name="DP2 overlap", data=2, overlap=True),
    Layout(name="EP2", data=2, expert=2),
    Layout(name="EP2 overlap", data=2, expert=2, overlap=True),
    Layout(name="EP4", data=4, expert=4),
    Layout(name="EP8", data=8, expert=8),
    Layout(name="DP4 EP2", data=4, expert=2),
    Layout(name="DP4 EP2 overlap", data=4, expert=2, overlap=True),
    Layout(name="DP8 EP4", data=8, expert=4),
    Layout(name="TP2 SP", tensor=2, sequence=True),
    Layout(name="TP2 SP ETP1", tensor=2, sequence=True, expert_tensor=1),
    Layout(name="TP2 SP EP2", tensor=2, sequence=True, expert=2),
    Layout(name="TP2 DP2 SP EP2", tensor=2, sequence=True, data=2, expert=2),
    Layout(name="TP2 DP2 SP EP4", tensor=2, sequence=True, data=2, expert=4),
    Layout(name="PP2", pipeline=2),
    Layout(name="PP2 EP2", pipeline=2, data=2, expert=2),
    Layout(name="PP2 VPP2", pipeline=2, virtual_pipeline=2),
    Layout(name="PP2 VPP2 EP2", pipeline=2, virtual_pipeline=2, data=2, expert=2),
    Layout(name="PP2 EP2 full recompute", pipeline=2, data=2, expert=2, recompute="full"),
    Layout(name="PP2 selective recompute", pipeline=2, recompute="selective"),
    Layout(name="CP2", context=2),
    Layout(name="CP2 EP2", context=2, expert=2),
    Layout(name="CP2 EP2, 1 sequence a row", context=2, expert=2, sequences_per_row=1),
    Layout(name="CP4 EP2", context=4, expert=2),
    Layout(name="TP2 CP2 SP EP2", tensor=2, context=2, sequence=True, expert=2),
    Layout(name="TP2 CP2 SP EP4", tensor=2, context=2, sequence=True, expert=4),
    Layout(name="TP2 PP2 SP EP2", tensor=2, pipeline=2, sequence=True, expert=2),
    Layout(name="PP2 VPP2 CP2 EP2", pipeline=2, virtual_pipeline=2, context=2, expert=2),
    Layout(name="TP2 PP2 CP2 SP EP4", tensor=2, pipeline=2, context=2, sequence=True, expert=4),
    Layout(name="TP2 PP2 DP2 SP EP2", tensor=2, pipeline=2, data=2, sequence=True, expert=2),
    Layout(name="TP2 CP2 DP2 SP EP8", tensor=2, context=2, data=2, sequence=True, expert=8),
    Layout(name="TP2 CP2 DP2 SP", tensor=2, context=2, data=2, sequence=True),
)
"""For models with experts, which Megatron trains over tensor ranks with sequence parallelism alone."""


def layouts_of(architecture: Architecture) -> tuple[Layout, ...]:
    """What there is to compare for a model, one process first."""
    return LAYOUTS if architecture.experts is None else EXPERT_LAYOUTS


def layouts_named(names: Sequence[str]) -> list[Layout]:
    """The layouts of these names. Raises UserError that lists the names there are."""
    known = {layout.name: layout for layout in (*EXPERT_LAYOUTS, *LAYOUTS)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"there is no layout {unknown[0]!r}; known: {', '.join(known)}")
    return [known[name] for name in names]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutResult:
    """What a layout computed, the same on every rank."""

    losses: list[float]
    grad_norms: list[float]
    logprobs: list[npt.NDArray[np.float32]]
    """Of every sample, before the first step; entry t is the log-prob of token t + 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A layout against one process."""

    loss: float
    """Largest relative difference over the steps."""
    grad_norm: float
    logprobs: float
    """Largest absolute difference over all trained tokens, in nats."""

    def within(self, tolerance: float) -> bool:
        """Whether loss and gradient norm agree within `tolerance`, and log-probs within ten times that."""
        return self.loss <= tolerance and self.grad_norm <= tolerance and self.logprobs <= 10 * tolerance


def ragged_samples(vocab_size: int, longest: int, count: int = 12, seed: int = 0) -> list[Sample]:
    """Random samples of many lengths, a single token and the longest allowed among them; prompts are not trained."""
    generator = np.random.default_rng(seed)
    lengths = [1, longest, 2, *generator.integers(3, max(longest // 2, 4), size=max(count - 3, 0)).tolist()]
    samples = []
    for length in lengths[:count]:
        tokens = generator.integers(0, vocab_size, size=length).astype(np.int32)
        trained = np.arange(length) >= length // 4
        samples.append(Sample(tokens=tokens, trained=trained))
    return samples


def stored_samples(store: SampleStore, longest: int, count: int = 12) -> list[Sample]:
    """The shortest and the longest sample of a store that fit, and its first ones, `count` in all."""
    lengths = np.asarray(store.lengths)
    fitting = np.flatnonzero(lengths <= longest)
    if not len(fitting):
        raise UserError(f"no sample of data.train fits {longest} tokens (data.max_length)")
    ends = [int(fitting[lengths[fitting].argmin()]), int(fitting[lengths[fitting].argmax()])]
    chosen = list(dict.fromkeys([*ends, *(int(index) for index in fitting[: count + 2])]))[:count]
    return [store[index] for index in chosen]


def measure(
    config: SFTConfig, layout: Layout, samples: Sequence[Sample], steps: int, loss_name: LossName = "nll"
) -> LayoutResult:
    """Run the samples in a layout: to be called on each of its processes."""
    return measure_losses(config, layout, samples, steps, [loss_name])[loss_name]


def measure_losses(
    config: SFTConfig, layout: Layout, samples: Sequence[Sample], steps: int, loss_names: Sequence[LossName]
) -> dict[LossName, LayoutResult]:
    """`measure` of several losses, each from the same start, in one set of process groups."""
    laid_out = layout.apply(config)
    found: dict[LossName, LayoutResult] = {}
    with world(laid_out.parallel, laid_out.seed) as topology:
        for loss_name in loss_names:
            seed_everything(laid_out.seed)
            found[loss_name] = _measure(laid_out, layout, topology, samples, steps, loss_name)
    return found


def _measure(
    config: SFTConfig, layout: Layout, topology: Topology, samples: Sequence[Sample], steps: int, loss_name: LossName
) -> LayoutResult:
    with closing(Engine(config, topology)) as engine:
        rows = _rows(samples, layout.sequences_per_row, config.data.tokens_per_microbatch)
        mine = range(topology.data.rank, len(rows), topology.data.size)
        batches = _batches(samples, [rows[index] for index in mine], loss_name)
        logprobs = [values.numpy() for values in engine.logprobs(batches)]
        if loss_name == "gppo":
            batches = [_with_old_logprobs(batch, values) for batch, values in zip(batches, logprobs, strict=True)]
        loss: TokenLoss = GPPO() if loss_name == "gppo" else NLL()
        stats = [engine.train_step(batches, loss) for _ in range(steps)]
        shares = exchange.gather_all(_by_sample(samples, [rows[index] for index in mine], logprobs))
    whole = {index: values for share in shares for index, values in share.items()}
    return LayoutResult(
        losses=[step.loss for step in stats],
        grad_norms=[step.grad_norm for step in stats],
        logprobs=[whole[index] for index in range(len(samples))],
    )


def compare(result: LayoutResult, reference: LayoutResult, samples: Sequence[Sample]) -> Comparison:
    """How far a layout is from the reference."""

    def relative(found: Sequence[float], expected: Sequence[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))

    differences = [
        float(np.abs(a - b)[:-1][sample.trained[1:]].max(initial=0.0))
        for a, b, sample in zip(result.logprobs, reference.logprobs, samples, strict=True)
    ]
    return Comparison(
        loss=relative(result.losses, reference.losses),
        grad_norm=relative(result.grad_norms, reference.grad_norms),
        logprobs=max(differences),
    )


def _rows(samples: Sequence[Sample], sequences_per_row: int, tokens_per_row: int) -> list[list[int]]:
    """Samples in their order, at most so many and so long together in a row."""
    rows: list[list[int]] = []
    size = tokens_per_row
    for index, sample in enumerate(samples):
        size += len(sample.tokens)
        if size > tokens_per_row or len(rows[-1]) == sequences_per_row:
            rows.append([])
            size = len(sample.tokens)
        rows[-1].append(index)
    return rows


def _batches(samples: Sequence[Sample], rows: Sequence[Sequence[int]], loss_name: LossName) -> list[PackedBatch]:
    """Rows with token-mean weights; for GPPO every sample has an advantage of its own, of either sign."""
    weights = loss_weights(np.array([num_predicted(sample) for sample in samples]), "token_mean")
    advantages = np.random.default_rng(1).normal(size=len(samples))
    return [
        pack(
            [samples[index] for index in row],
            [float(weights[index]) for index in row],
            advantages=[float(advantages[index]) for index in row] if loss_name == "gppo" else None,
        )
        for row in rows
    ]


def _with_old_logprobs(batch: PackedBatch, logprobs: npt.NDArray[np.float32]) -> PackedBatch:
    """Old log-probs that scatter the ratios over every clip region, by a rule of token and target alone."""
    spread = torch.sin(batch.tokens.double() * 1.7 + batch.targets.double() * 0.9).float() * 0.6
    return dataclasses.replace(batch, old_logprobs=torch.from_numpy(logprobs) + spread)


def _by_sample(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], logprobs: Sequence[npt.NDArray[np.float32]]
) -> dict[int, npt.NDArray[np.float32]]:
    found = {}
    for row, values in zip(rows, logprobs, strict=True):
        start = 0
        for index in row:
            end = start + len(samples[index].tokens)
            found[index] = values[start:end]
            start = end
    return found
