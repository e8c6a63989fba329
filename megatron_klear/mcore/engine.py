"""A Megatron model and its optimizer behind a few verbs. No caller sees a process group or a model chunk.

Every method is collective: all ranks call it in the same order. `batches` are the rows of this data-parallel rank, the
same on all ranks of one model replica. The weights of all rows of a step, over all ranks, sum to one; the engine only
sums (a step's loss is the sum of weight * token loss, its gradient the plain sum over ranks), so that layouts, packing
and micro-batching change speed and never the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.config.base import RunConfig
from megatron_klear.config.checks_lora import adapted_matrices
from megatron_klear.distributed import exchange
from megatron_klear.errors import UserError
from megatron_klear.kernels import send
from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore import lora, lora_weights
from megatron_klear.mcore import weights as hf
from megatron_klear.mcore.activation_offload import ActivationOffload
from megatron_klear.mcore.checkpoints import save as checkpoint
from megatron_klear.mcore.checkpoints.adapters import Base
from megatron_klear.mcore.experts import routing_metrics
from megatron_klear.mcore.gradients import sum_gradients, wrap
from megatron_klear.mcore.head import Head
from megatron_klear.mcore.host_optimizer import check_offload
from megatron_klear.mcore.model import PolicyModel, build_chunks, inverse_frequencies
from megatron_klear.mcore.offload import TrainingMemory
from megatron_klear.mcore.optimizer import build_optimizer, guarded_step, learning_rate, set_rates
from megatron_klear.mcore.reading import check_frequencies
from megatron_klear.mcore.reference import Reference
from megatron_klear.mcore.rows import LocalRow, empty_batch, local_row
from megatron_klear.mcore.topology import Topology
from megatron_klear.models.architecture import Architecture, read_architecture
from megatron_klear.models.stop_tokens import Turns
from megatron_klear.types import KLEstimator, PackedBatch, StepStats, TokenLoss

device_shim.install()

from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402  (the shim must come first)


class Engine:
    """The policy in training: forward, backward, optimizer, checkpoints and Hugging Face weights.

    `step` counts optimizer steps taken or skipped. `total_steps` is where the learning-rate decay ends.
    """

    def __init__(
        self,
        run: RunConfig,
        topology: Topology,
        *,
        total_steps: int | None = None,
        architecture: Architecture | None = None,
        turns: Turns | None = None,
    ) -> None:
        """Build the model, load its weights, and build its optimizer.

        Folders saved with checkpoints have the end of turn and the chat template of `turns`.
        """
        check_offload(run, topology.device)
        self.turns = turns or Turns()
        self.run = run
        self.topology = topology
        self.total_steps = total_steps
        self.architecture = architecture if architecture is not None else read_architecture(run.model.path)
        self.step = 0
        self._saver = checkpoint.Saver(asynchronous=run.checkpoint.asynchronous)
        check_frequencies(self.architecture, run.model.path)
        self.models = build_chunks(self.architecture, run, topology)
        self._load_initial_weights()
        lora.freeze(self.models, recompute=run.recompute.granularity != "none")
        self.overlap = run.optimizer.overlap and topology.data_context.size > 1
        self.chunks = wrap(self.models, run, topology, self.overlap)
        self.optimizer = build_optimizer(run, self.chunks, self.overlap)
        self._memory = TrainingMemory(self.chunks, self.optimizer, topology.device)
        offload = run.offload if run.offload.activations else None
        self._offload = ActivationOffload(offload, self.models, topology.device) if offload else None
        self.head = Head(run.model, self.architecture, topology)
        self.inverse_frequencies = inverse_frequencies(self.architecture)[0].to(topology.device)
        self._reference: Reference | None = None
        config = self.models[0].config
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = sum_gradients
        if self.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def train_step(
        self,
        batches: Sequence[PackedBatch],
        loss: TokenLoss,
        *,
        temperature: float = 1.0,
        entropy_coefficient: float = 0.0,
        kl_coefficient: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        ratios: list[Tensor] | None = None,
    ) -> StepStats:
        """Take one optimizer step over this data rank's micro-batches.

        `loss` maps log-probs to per-token losses; it sees only its own tokens. `kl_coefficient` and `kl_estimator` are
        weight and form of the KL to the rows' `ref_logprobs`. A list given as `ratios` gets those of each row [T], of
        present to old policy, fp32 on the CPU; 0 where a token has no weight. A step whose loss or gradient norm is
        not finite leaves weights and optimizer alone and says so in `skipped`.
        """
        self.wake()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = self._rows(batches)
        compute = partial(
            self.head.loss,
            loss=loss,
            temperature=temperature,
            entropy_coefficient=entropy_coefficient,
            kl_coefficient=kl_coefficient,
            kl_estimator=kl_estimator,
            keep_ratios=ratios is not None,
        )
        results = self._run(rows, compute)
        if ratios is not None:
            ratios += self._all_whole(rows, [sums.pop("ratios") for sums in results])[: len(batches)]
        sums = self._reduce(results)
        total = sums.pop("loss")
        rate = learning_rate(self.run.optimizer, self.step, self.total_steps)
        set_rates(self.optimizer, rate, self.run.optimizer.weight_decay)
        stepped, norm = guarded_step(self.optimizer, total, self.run.optimizer.clip_grad)
        self.step += 1
        real = [batch for batch in batches if batch.num_trained]  # a row without weights only keeps ranks in step
        own = [(batch.num_tokens, batch.num_trained, len(batch.cu_seqlens) - 1) for batch in real]
        counts = self.topology.all_reduce(
            [sum(column) for column in zip((0, 0, 0), *own, strict=True)], self.topology.data
        )
        sums["entropy"] /= max(counts[1], 1.0)  # the mean over trained tokens, whatever each weighs in the loss
        return StepStats(
            step=self.step,
            loss=total,
            grad_norm=norm,
            learning_rate=rate,
            num_tokens=int(counts[0]),
            num_trained_tokens=int(counts[1]),
            num_sequences=int(counts[2]),
            skipped=not stepped,
            metrics=sums | routing_metrics(self.models, self.run.model, self.topology),
        )

    def sleep(self) -> int:
        """Give back what only training needs, for servers on the same cards; the bytes that left this rank's card.

        Weights stay, so that they can be sent and `logprobs` works. What trains, saves or loads wakes the engine again;
        servers must have given the cards back by then.
        """
        return self._memory.sleep()

    def wake(self) -> None:
        """Take back what `sleep` gave; nothing is changed by the two, bit by bit."""
        self._memory.wake()

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch], *, temperature: float = 1.0) -> list[Tensor]:
        """Log-probabilities [T] of each row's targets under the current weights, fp32 on the CPU, on every rank.

        Entries without a target (the last token of a sequence) are those of target 0 and mean nothing.
        """
        for chunk in self.chunks:
            chunk.eval()
        rows = self._rows(batches)
        results = self._run(rows, partial(self.head.logprobs, temperature=temperature), forward_only=True)
        return self._all_whole(rows, results)[: len(batches)]

    def keep_reference(self, folder: Path | None = None) -> None:
        """Keep a frozen model to measure the KL against: the weights in `folder`, or the present ones.

        A copy in host memory, but for adapters that start at zero: their base is there. To be called before the first
        step and before a checkpoint is loaded.
        """
        load = None
        if folder is not None:
            load = partial(hf.load_hf_weights, self.models, self.architecture, folder, self.topology)
        starts_at_base = self.run.lora is not None and self.run.lora.adapter is None
        self._reference = Reference.keep(self.models, load, is_base=starts_at_base and folder is None)

    def reference_logprobs(self, batches: Sequence[PackedBatch], *, temperature: float = 1.0) -> list[Tensor]:
        """`logprobs` under the reference that `keep_reference` kept, which chooses its experts itself."""
        if self._reference is None:
            raise RuntimeError("there is no reference model: call keep_reference first")
        self._gather_parameters()
        own = [replace(batch, routes=None, sampler_routes=None) for batch in batches]
        with self._reference.in_place():
            return self.logprobs(own, temperature=temperature)

    def evaluate(self, batches: Sequence[PackedBatch], loss: TokenLoss) -> float:
        """The weighted loss over the batches of all data ranks, without a gradient."""
        total = 0.0
        for batch, logprobs in zip(batches, self.logprobs(batches), strict=True):
            per_token = loss(logprobs, batch.old_logprobs, batch.advantages)
            weights = batch.weights.double()
            total += float((weights * torch.where(weights != 0, per_token.double(), 0.0)).sum())
        return self.topology.all_reduce([total], self.topology.data)[0]

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model under its Hugging Face names, one whole tensor at a time, on every rank; adapters merged in."""
        self._gather_parameters()
        merged = lora.merging(self.models)
        yield from hf.iter_hf_weights(self.models, self.architecture, self.topology, value_of=merged)

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters under PEFT's names, one whole tensor at a time, on every rank."""
        self._gather_parameters()
        yield from lora_weights.iter_adapters(self.models, self.topology)

    @cached_property
    def base(self) -> Base | None:
        """The frozen model under adapters, None where all weights are trained. Collective where first asked for."""
        if self.run.lora is None:
            return None
        sha256 = lora_weights.base_checksum(self.models, self.architecture, self.topology)
        return Base.of(self.run, sha256, adapted_matrices(self.run.lora, self.architecture))

    def save(
        self,
        path: Path,
        extra: dict[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint at `path`; it appears whole or not at all.

        `extra` is kept with it, as JSON, and `files` by name in its folder, both those of rank 0. With
        `checkpoint.asynchronous` the writing goes on in the background; `finish_save` waits for it. `ready` is called
        on every rank once all is written: the checkpoint appears when it returns, and not where it raises.
        """
        self.wake()
        self._gather_parameters()
        self._saver.save(
            path,
            checkpoint.TrainingState(
                models=self.models,
                optimizer=self.optimizer,
                step=self.step,
                extra=extra or {},
                files=files or {},
                turns=self.turns,
                base=self.base,
            ),
            self.topology,
            self.run.model.path,
            ready,
        )

    def finish_save(self, *, blocking: bool = True) -> None:
        """Complete a background save that is done, or with `blocking` wait for it."""
        self._saver.finish(blocking=blocking)

    def load(self, path: Path) -> dict[str, Any]:
        """Continue from a checkpoint written in any layout; returns the `extra` it was saved with."""
        self.wake()
        state = checkpoint.TrainingState(models=self.models, optimizer=self.optimizer, step=0, extra={}, base=self.base)
        loaded = checkpoint.load(path, state, self.topology)
        self.step = loaded.step
        return loaded.extra

    def close(self) -> None:
        """Wait for background writing to end."""
        self._saver.close()

    def _load_initial_weights(self) -> None:
        model = self.run.model
        if model.checkpoint is not None:
            checkpoint.load_weights(model.checkpoint, self.models, self.topology)
        elif model.weights == "random":
            hf.load_random_weights(self.models, self.architecture, self.run.seed, self.topology)
        else:
            hf.load_hf_weights(self.models, self.architecture, model.path, self.topology)
        if self.run.lora is not None:
            lora_weights.start_adapters(self.models, self.run.lora, self.run.seed, self.topology)

    def _rows(self, batches: Sequence[PackedBatch]) -> list[LocalRow]:
        """Rows in this rank's layout, and rows of nothing where ranks have to keep in step.

        Virtual stages want a whole number of pipeline rounds, experts of other ranks as many rows as those have.
        """
        topology, count = self.topology, max(len(batches), 1)
        if topology.expert.size > 1:
            count = int(topology.all_reduce([count], topology.data, dist.ReduceOp.MAX)[0])
        if topology.parallel.virtual_pipeline > 1:
            count += -count % topology.pipeline.size
        padded = list(batches)
        for batch in batches:
            largest = int(torch.maximum(batch.tokens.max(), batch.targets.max()))
            if largest >= self.architecture.vocab_size:
                raise UserError(
                    f"a row holds token id {largest}, and config.json of model.path {self.run.model.path} has "
                    f"vocab_size {self.architecture.vocab_size}: tokenizer and model do not belong together"
                )
        padded += [empty_batch(batches[0] if batches else None)] * (count - len(batches))
        return [local_row(batch, topology, self.run.row_multiple) for batch in padded]

    def _run(self, rows: list[LocalRow], compute: Any, *, forward_only: bool = False) -> list[Any]:
        """Megatron's schedule over the rows; what `compute` returned for each, on the last stage only."""

        def forward(iterator: Iterator[LocalRow], chunk: Any) -> tuple[Tensor, Any]:
            row = next(iterator)
            model: PolicyModel = chunk.module
            with self._offload.row() if self._offload is not None else nullcontext():
                output = chunk(row.tokens, None, None, packed_seq_params=row.params)
            self._await_head(chunk)
            return output, partial(compute, model, row)

        def sent() -> Iterator[LocalRow]:
            return (row.on(self.topology.device, self.inverse_frequencies) for row in rows)

        iterators = [sent() for _ in self.chunks]
        single = len(self.chunks) == 1
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else self.chunks,
            num_microbatches=len(rows),
            seq_length=max(row.tokens.shape[1] for row in rows) * self.topology.context.size,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results

    def _reduce(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sums of the per-row sums over rows and ranks; the same on every rank."""
        topology = self.topology
        names: list[str] = sorted(results[0]) if results else []
        sums = torch.zeros(0)
        if results:
            sums = torch.stack([torch.stack([r[name].double() for name in names]) for r in results]).sum(0)
            if topology.data_context.size > 1:
                dist.all_reduce(sums, group=topology.data_context.group)
        if topology.pipeline.size > 1:
            whole = dict(zip(names, sums.tolist(), strict=True))
            return exchange.tell_group(whole, topology.last_stage_rank, topology.pipeline.group)
        return dict(zip(names, sums.tolist(), strict=True))

    def _all_whole(self, rows: list[LocalRow], results: list[Tensor]) -> list[Tensor]:
        """The last stage's per-token values [T_local] of all rows, each in unpadded order [T], on every rank's host."""
        topology = self.topology
        starts = np.cumsum([0, *(row.num_tokens for row in rows)])
        values = torch.zeros(int(starts[-1]), dtype=torch.float32, device=topology.device)
        if results:
            places = [(row.source >= 0).nonzero().squeeze(-1) for row in rows]
            of_values = torch.cat(
                [row.source[place] + int(at) for row, place, at in zip(rows, places, starts, strict=False)]
            )
            taken = [local.float()[send(place, topology.device)] for local, place in zip(results, places, strict=True)]
            values[send(of_values, topology.device)] = torch.cat(taken)
            if topology.context.size > 1:
                dist.all_reduce(values, group=topology.context.group)
        if topology.pipeline.size > 1:
            dist.broadcast(values, src=topology.last_stage_rank, group=topology.pipeline.group)
        return list(torch.split(values.cpu(), [row.num_tokens for row in rows]))

    def _await_head(self, chunk: Any) -> None:
        """Wait for the gathering of the head's weight: its module's forward, whose hook would, is never called."""
        trained = chunk.module.post_process and chunk.module.head_weight.requires_grad
        if self.overlap and self.run.optimizer.distributed and trained:
            chunk.param_to_bucket_group[chunk.module.head_weight].finish_param_sync()

    def _gather_parameters(self) -> None:
        """Bring weights up to date where their gathering is left to the next forward pass."""
        if self.overlap and self.run.optimizer.distributed:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
