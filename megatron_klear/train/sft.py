"""Supervised fine-tuning: read a step, train, now and then validate and save.

`run` wires the rooms together; `fit` is the loop. All ranks execute both in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from megatron_klear.config.base import DataConfig, SFTConfig
from megatron_klear.config.read import write_resolved
from megatron_klear.config.start import Start
from megatron_klear.data.ahead import StepsAhead
from megatron_klear.data.packing import RowSettings, sequence_work
from megatron_klear.data.sft import SampleStream, held_out_steps
from megatron_klear.data.store import TokenStore
from megatron_klear.data.tokenizer import load_tokenizer
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.save import latest_valid
from megatron_klear.mcore.compare_logits import compare_with_transformers
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import Topology, world
from megatron_klear.rl.losses import NLL
from megatron_klear.runs.folder import checkpoints_of, prepare_folder, publishing, resolved_settings
from megatron_klear.runs.leave import Leaving
from megatron_klear.runs.log import RunLog, Throughput, open_log
from megatron_klear.train.guard import SkipGuard
from megatron_klear.train.stores import open_for_all
from megatron_klear.train.turn_end import export_folder, stop_tokens_of, training_notes, turns_of
from megatron_klear.types import PackedBatch


def run(start: Start) -> None:
    """Train from the beginning or from the newest whole checkpoint of the run's folder, to the last step."""
    config, architecture = start.config, start.architecture
    with world(config.parallel, config.seed) as topology, prepare_folder(config, topology) as changed:
        store = open_for_all(config.data, config.model.path, "train")
        stream = SampleStream(
            store,
            _row_settings(config),
            work=sequence_work(architecture),
            aggregation=config.train.aggregation,
            seed=config.seed,
            content=store.fingerprint,
            data_rank=topology.data.rank,
            data_size=topology.data.size,
        )
        total_steps = stream.total_steps(config.train.epochs, config.train.steps)
        tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
        stop = stop_tokens_of(config.model.path, tokenizer)
        turns = turns_of(stop, config.data.chat_template)
        engine = Engine(config, topology, total_steps=total_steps, architecture=architecture, turns=turns)
        checkpoint = latest_valid(checkpoints_of(config), topology)
        if checkpoint is not None:
            stream.load_state_dict(engine.load(checkpoint)["data"])
        if topology.rank == 0:
            write_resolved(config, resolved_settings(config))
        device = torch.cuda.get_device_name() if topology.device.type == "cuda" else None
        throughput = Throughput.of(config, architecture, topology.size, device)
        with ExitStack() as outputs, publishing(engine):
            # Closed last: a tracker takes longer than ranks wait for each other to publish.
            log = outputs.enter_context(
                open_log(
                    config, rank=topology.rank, resume_step=engine.step, total_steps=total_steps, throughput=throughput
                )
            )
            for warning in (*start.warnings, *changed):
                log.say(f"warning: {warning}")
            for note in training_notes(tokenizer, stop):
                log.say(f"note: {note}")
            if checkpoint is None and (compared := compare_with_transformers(engine)):
                log.say(f"note: {compared}")
            if checkpoint is not None:
                log.say(f"resuming from {checkpoint}, step {engine.step} of {total_steps}")
            with Leaving(topology) as leaving, StepsAhead(stream) as steps:
                fit(config, engine, steps, Validation.of(config, topology, engine), log, total_steps, leaving)
        if config.checkpoint.export_hf:
            export_folder(engine, config.output / "hf")


def fit(
    config: SFTConfig,
    engine: Engine,
    steps: StepsAhead,
    validation: Validation,
    log: RunLog,
    total_steps: int,
    leaving: Leaving,
) -> None:
    """Train until `total_steps` optimizer steps have been taken. Raises RunLeft, saved, where a signal asks for it."""
    loss, guard = NLL(), SkipGuard(config.output / "skipped", config.train.max_skipped_steps, engine.topology.rank)
    capacity = config.train.rows_per_step * config.data.tokens_per_microbatch
    if engine.step == 0 and config.train.validate_every:
        validation.report(log)
    log.start()
    while engine.step < total_steps:
        with log.time("data"):
            batches = steps.next_step(last=engine.step + 1 == total_steps)
        with log.time("train"):
            stats = engine.train_step(batches, loss)
        log.step(stats, capacity_tokens=capacity, mean_context=mean_context(batches))
        guard.observe(stats, batches, log)
        last = engine.step == total_steps
        if leaving.asked() and not last:
            engine.finish_save()
            save(config, engine, steps, blocking=True)
            raise leaving.left(engine.step, manifest.step_folder(checkpoints_of(config), engine.step))
        if config.train.validate_every and (last or engine.step % config.train.validate_every == 0):
            with log.time("validation", outside_step=True):
                validation.report(log)
        with log.time("save", outside_step=True):
            engine.finish_save(blocking=False)
            if last or (config.checkpoint.save_every and engine.step % config.checkpoint.save_every == 0):
                save(config, engine, steps, blocking=last)


def save(config: SFTConfig, engine: Engine, steps: StepsAhead, *, blocking: bool) -> None:
    """Write a checkpoint of this step and let the oldest go; nothing is removed before a newer one is whole."""
    engine.save(manifest.step_folder(checkpoints_of(config), engine.step), {"data": steps.state_dict()})
    if blocking:
        engine.finish_save()
    if engine.topology.rank == 0:
        manifest.retire(checkpoints_of(config), config.checkpoint.keep, config.checkpoint.keep_every)


def mean_context(batches: Sequence[PackedBatch]) -> float:
    """Tokens that a token of these rows attends to on average."""
    lengths = np.concatenate([np.diff(batch.cu_seqlens.numpy()) for batch in batches]).astype(np.float64)
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """The loss over the held-out samples; without any, reports nothing."""

    config: SFTConfig
    store: TokenStore | None
    engine: Engine

    @classmethod
    def of(cls, config: SFTConfig, topology: Topology, engine: Engine) -> Validation:
        """Open the held-out samples, where the settings name any."""
        data: DataConfig = config.data
        held_out = bool(data.validation or data.validation_share)
        return cls(
            config=config,
            store=open_for_all(data, config.model.path, "validation") if held_out else None,
            engine=engine,
        )

    def report(self, log: RunLog) -> None:
        """Compute the loss over all held-out samples under the current weights and log it."""
        if self.store is None:
            return
        topology = self.engine.topology
        steps = held_out_steps(
            self.store,
            _row_settings(self.config),
            work=sequence_work(self.engine.architecture),
            aggregation=self.config.train.aggregation,
            data_rank=topology.data.rank,
            data_size=topology.data.size,
        )
        loss = sum(self.engine.evaluate(batches, NLL()) for batches in steps)
        log.validation(self.engine.step, {"loss": loss})


def _row_settings(config: SFTConfig) -> RowSettings:
    return RowSettings(
        tokens_per_row=config.data.tokens_per_microbatch,
        segment_multiple=config.data.segment_multiple,
        rows_per_step=config.train.rows_per_step,
        packing=config.data.packing,
    )
