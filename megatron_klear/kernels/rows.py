"""From a chunk of logits to per-token losses and the gradient of the logits: the typed face of csrc/.

Each function takes a chunk of C rows. The formulas, the meaning of the regions and the treatment of extremes are
written in csrc/policy_loss.h. A row's result depends on that row alone, not on threads or chunks.

One pass where the vocabulary is whole (`policy_loss_rows`, `logprob_rows`); three phases where it is sharded:
`stats_rows` on each rank, an all-gather and `combine_stats`, then `finish_rows` (or `logprobs_from_stats`). Where ranks
reach each other's memory, `sharded_rows` does the three in one launch on each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from megatron_klear.kernels.extension import CudaCore, core
from megatron_klear.kernels.inputs import Terms, Tokens
from megatron_klear.types import KLEstimator, LossCoefficients, LossKind

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOutputs:
    """Per-token results [C], on the logits' device; 0 on rows of weight zero."""

    logprobs: Tensor  # float32, of the target under softmax(logits / temperature)
    entropy: Tensor  # float32, nats
    lse: Tensor  # float32, log-sum-exp of logits / temperature
    ratio: Tensor  # float32, exp(clamp(logprob - old, -20, 20)); 1 on-policy
    loss: Tensor  # float32, weighted: the loss of the chunk is the plain sum
    region: Tensor  # uint8: 0 unclipped, 1 A<0 r<low, 2 A>=0 r>high, 3 A>=0 r<low, 4 A<0 r>high, 5 dual clip
    status: Tensor  # uint8, bits: 1 target outside the vocabulary, 2 target of logit -inf, 4 logits not finite

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> RowOutputs:
        """Uninitialised outputs for `num_tokens` rows, to be filled chunk by chunk."""
        small = ("region", "status")
        names = [field.name for field in fields(cls)]
        dtypes = {name: torch.uint8 if name in small else torch.float32 for name in names}
        return cls(**{name: torch.empty(num_tokens, dtype=dtypes[name], device=device) for name in names})

    def chunk(self, start: int, stop: int) -> RowOutputs:
        """Views of rows [start, stop), to pass as `out`."""
        return RowOutputs(**{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})


def policy_loss_rows(
    logits: Tensor,
    tokens: Tokens,
    terms: Terms,
    *,
    vocab_size: int | None = None,
    gradient: Tensor | None = None,
    out: RowOutputs | None = None,
    threads: int | None = None,
) -> RowOutputs:
    """Losses of C tokens over a whole vocabulary, and d loss / d logits written over the logits.

    `logits` [C, V] float32 or bfloat16, columns contiguous. `vocab_size` counts the columns that are not padding (None:
    all). `gradient` None means in place; it may be another [C, V] buffer, or `bf16_view(logits)`. `threads` bounds the
    CPU's threads (None: torch's number).

    Raises ValueError on shapes, types or strides that do not fit, KernelUnavailable where the kernels are not built.
    """
    rows = _Rows(logits, logits if gradient is None else gradient, 0, vocab_size, threads)
    return rows.run(rows.tokens(tokens, required=True), _loss(rows.module, terms, tokens.advantages), out)


def logprob_rows(
    logits: Tensor,
    tokens: Tokens,
    *,
    vocab_size: int | None = None,
    out: RowOutputs | None = None,
    threads: int | None = None,
) -> RowOutputs:
    """Log-prob, entropy and log-sum-exp of C tokens; the logits are read only and ratio, loss, region are idle.

    Of `tokens` only targets and temperature are read.
    """
    rows = _Rows(logits, None, 0, vocab_size, threads)
    read = Tokens(targets=tokens.targets, temperature=tokens.temperature)
    return rows.run(rows.tokens(read), _loss(rows.module, _NO_TERMS, None), out)


def stats_rows(
    logits: Tensor,
    tokens: Tokens,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    threads: int | None = None,
) -> Tensor:
    """Statistics [4, C] float32 of one vocabulary shard: max, sum of exp, entropy part, target logit.

    Column 0 of `logits` [C, V_local] is vocabulary id `vocab_start`; targets and `vocab_size` are those of the whole
    vocabulary. With weights, rows of weight zero are not read.
    """
    rows = _Rows(logits, None, vocab_start, vocab_size, threads)
    stats = torch.empty((4, rows.count), dtype=torch.float32, device=logits.device)
    if rows.count:
        rows.core.call("stats", rows.struct, rows.tokens(tokens), stats.data_ptr())
    return stats


def combine_stats(stats: Tensor) -> Tensor:
    """Merge the shards' statistics [ranks, 4, C], in the order of the ranks, into [4, C].

    The result has the same bits on every rank, on the CPU and on CUDA.
    """
    if stats.dim() != 3 or stats.shape[1] != 4 or stats.dtype != torch.float32 or not stats.is_contiguous():
        raise ValueError(f"stats must be contiguous float32 [ranks, 4, C], not {stats.dtype} {tuple(stats.shape)}")
    ranks, _, count = stats.shape
    combined = torch.empty((4, count), dtype=torch.float32, device=stats.device)
    if count:
        core(stats.device).call("combine", stats.data_ptr(), ranks, count, combined.data_ptr())
    return combined


def finish_rows(
    logits: Tensor,
    stats: Tensor,
    tokens: Tokens,
    terms: Terms,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    gradient: Tensor | None = None,
    out: RowOutputs | None = None,
    threads: int | None = None,
) -> RowOutputs:
    """Losses and this shard's gradient from the combined statistics [4, C]; otherwise as `policy_loss_rows`."""
    rows = _Rows(logits, logits if gradient is None else gradient, vocab_start, vocab_size, threads)
    return rows.run(rows.tokens(tokens, required=True), _loss(rows.module, terms, tokens.advantages), out, stats)


class Peers(Protocol):
    """How the kernels of a vocabulary's shards reach each other (`mailboxes.Mailboxes`)."""

    def turn(self, module: Any, rows: int) -> Any:
        """The kernel's argument for the next launch, of `rows` rows."""


def sharded_rows(
    logits: Tensor,
    tokens: Tokens,
    terms: Terms,
    peers: Peers,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    gradient: Tensor | None = None,
    out: RowOutputs | None = None,
) -> RowOutputs:
    """Losses and this shard's gradient, the shard's logits read once: for CUDA, at the same time on all ranks.

    Every rank must call it with the same tokens and terms; a kernel waits for those of the others while it runs.
    Outputs have the same bits on every rank; statistics add up a shard in another order than `stats_rows`. Otherwise
    as `policy_loss_rows`.
    """
    rows = _Rows(logits, logits if gradient is None else gradient, vocab_start, vocab_size, None)
    checked = rows.tokens(tokens, required=True)
    return rows.run(checked, _loss(rows.module, terms, tokens.advantages), out, peers=peers)


def sharded_refusal(logits: Tensor, gradient: Tensor) -> str:
    """Why the device of `logits` cannot run `sharded_rows` on rows so wide, in CUDA's words; empty where it can."""
    rows = _Rows(logits, gradient, 0, None, None)
    return rows.core.sharded_refusal(rows.struct) if isinstance(rows.core, CudaCore) else "it is no CUDA device"


def logprobs_from_stats(stats: Tensor, *, out: RowOutputs | None = None, threads: int | None = None) -> RowOutputs:
    """What `logprob_rows` gives, from the combined statistics [4, C] alone."""
    rows = _Rows(stats.new_empty((stats.shape[-1], 0)), None, 0, None, threads)
    tokens = rows.module.Tokens(**dict.fromkeys((*_TOKEN_FIELDS, "temperatures"), 0), temperature=1.0)
    return rows.run(tokens, _loss(rows.module, _NO_TERMS, None), out, stats)


def bf16_view(logits: Tensor) -> Tensor:
    """The memory of float32 logits [C, V] as bfloat16 [C, V], row i in the first half of row i.

    Passed as `gradient`, it makes the gradient overwrite the logits at half their width; the matrix products take it
    as it is, with a row stride twice as long.
    """
    if logits.dtype != torch.float32:
        raise ValueError(f"bf16_view takes float32 logits, not {logits.dtype}")
    return logits.view(torch.bfloat16)[:, : logits.shape[1]]


_TOKEN_FIELDS = (
    "targets",
    "policy_weights",
    "nll_weights",
    "old_logprobs",
    "advantages",
    "ref_logprobs",
)
_NO_TERMS = Terms(coefficients=LossCoefficients(kind=LossKind.NLL))


class _Rows:
    """A checked chunk of logits and the calls made on it."""

    def __init__(
        self, logits: Tensor, gradient: Tensor | None, vocab_start: int, vocab_size: int | None, threads: int | None
    ) -> None:
        self.device = logits.device
        self.core = core(self.device, threads)
        self.module = self.core.module
        _check_matrix("logits", logits, self.core.aligned)
        self.count, columns = logits.shape
        if gradient is not None and gradient is not logits:
            _check_gradient(logits, gradient, self.core.aligned)
        valid = columns if vocab_size is None else max(0, min(columns, vocab_size - vocab_start))
        self.struct = self.module.Logits(
            logits=logits.data_ptr(),
            gradient=0 if gradient is None else gradient.data_ptr(),
            logits_stride=logits.stride(0),
            gradient_stride=0 if gradient is None else gradient.stride(0),
            rows=self.count,
            columns=columns,
            valid_columns=valid,
            vocab_start=vocab_start,
            logits_type=_TYPES[logits.dtype],
            gradient_type=_TYPES[logits.dtype if gradient is None else gradient.dtype],
        )

    def tokens(self, tokens: Tokens, *, required: bool = False) -> Any:
        """The per-token inputs, checked. With `required`, some weight must be given."""
        if required and tokens.policy_weights is None and tokens.nll_weights is None:
            raise ValueError("give policy_weights, nll_weights or both: without either no row has a loss")
        temperature = tokens.temperature
        per_token = temperature if isinstance(temperature, Tensor) else None
        number = 1.0 if isinstance(temperature, Tensor) else float(temperature)
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"temperature must be positive, not {temperature}")
        addresses = {name: self._address(name, getattr(tokens, name)) for name in _TOKEN_FIELDS}
        addresses["temperatures"] = self._address("temperature", per_token)
        return self.module.Tokens(**addresses, temperature=number)

    def run(
        self, tokens: Any, loss: Any, out: RowOutputs | None, stats: Tensor | None = None, peers: Peers | None = None
    ) -> RowOutputs:
        """One pass, alone or with `peers`, or the finish from `stats`."""
        result = RowOutputs.empty(self.count, self.device) if out is None else out
        addresses = {field.name: self._address(field.name, getattr(result, field.name)) for field in fields(result)}
        outputs = self.module.Outputs(**addresses)
        if stats is not None and (
            stats.shape != (4, self.count) or stats.dtype != torch.float32 or not stats.is_contiguous()
        ):
            raise ValueError(f"stats must be contiguous float32 [4, {self.count}], not {tuple(stats.shape)}")
        if self.count == 0:
            return result
        if stats is not None:
            self.core.call("finish", self.struct, tokens, loss, stats.data_ptr(), outputs)
        elif peers is not None:
            self.core.call("sharded_rows", self.struct, tokens, loss, outputs, peers.turn(self.module, self.count))
        else:
            self.core.call("rows", self.struct, tokens, loss, outputs)
        return result

    def _address(self, name: str, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        dtype = {"targets": torch.int64, "region": torch.uint8, "status": torch.uint8}.get(name, torch.float32)
        if tensor.shape != (self.count,) or tensor.dtype != dtype or tensor.device != self.device:
            raise ValueError(
                f"{name} must be {dtype} [{self.count}] on {self.device}, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
        return tensor.data_ptr()


def _loss(module: Any, terms: Terms, advantages: Tensor | None) -> Any:
    loss = terms.coefficients
    if loss.kind != LossKind.NLL and advantages is None:
        raise ValueError(f"a loss of kind {LossKind(loss.kind).name} needs advantages")
    return module.Coefficients(
        kind=int(loss.kind),
        ratio_low=loss.ratio_low,
        ratio_high=loss.ratio_high,
        beta_low=loss.beta_low,
        beta_high=loss.beta_high,
        dual_clip=loss.dual_clip,
        entropy_coefficient=terms.entropy_coefficient,
        kl_coefficient=terms.kl_coefficient,
        kl_estimator=get_args(KLEstimator).index(terms.kl_estimator),
    )


def _check_matrix(name: str, matrix: Tensor, aligned: bool) -> None:
    if matrix.dim() != 2 or matrix.dtype not in _TYPES:
        raise ValueError(f"{name} must be float32 or bfloat16 [C, V], not {matrix.dtype} {list(matrix.shape)}")
    rows, columns = matrix.shape
    if columns > 1 and matrix.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous columns; their stride is {matrix.stride(1)}")
    if rows > 1 and matrix.stride(0) < columns:
        raise ValueError(f"{name} has overlapping rows: stride {matrix.stride(0)} for {columns} columns")
    if not aligned or matrix.numel() == 0:
        return
    if matrix.data_ptr() % 16 or (rows > 1 and matrix.stride(0) * matrix.element_size() % 16):
        raise ValueError(f"rows of {name} must start at multiples of 16 bytes: pad the row stride to 8 elements")
    width = -(-columns // 8) * 8
    room = matrix.untyped_storage().nbytes() // matrix.element_size() - matrix.storage_offset()
    if (rows > 1 and matrix.stride(0) < width) or room < (rows - 1) * matrix.stride(0) + width:
        raise ValueError(f"{name} needs room for {width} columns a row: allocate [C, {width}] and pass [:, :{columns}]")


def _check_gradient(logits: Tensor, gradient: Tensor, aligned: bool) -> None:
    _check_matrix("gradient", gradient, aligned)
    if gradient.shape != logits.shape or gradient.device != logits.device:
        raise ValueError(f"gradient must be {list(logits.shape)} on {logits.device}, as the logits are")
    if gradient.dtype == torch.float32 and logits.dtype == torch.bfloat16:
        raise ValueError("the gradient of bfloat16 logits is bfloat16")

    def span(matrix: Tensor) -> tuple[int, int, int]:
        pitch = matrix.stride(0) * matrix.element_size()
        start = matrix.data_ptr()
        return start, start + (matrix.shape[0] - 1) * pitch + matrix.shape[1] * matrix.element_size(), pitch

    start, stop, pitch = span(logits)
    other_start, other_stop, other_pitch = span(gradient)
    in_place = start == other_start and (pitch == other_pitch or logits.shape[0] == 1)
    if not in_place and start < other_stop and other_start < stop:
        raise ValueError("gradient overlaps the logits without being bf16_view(logits) or the logits themselves")
