"""Wiring of a reinforcement-learning run: the rooms are opened here, the loop is in `gppo.py`."""

from __future__ import annotations

from contextlib import ExitStack, closing

import torch

from megatron_klear.config.read import write_resolved
from megatron_klear.config.start import GPPOStart
from megatron_klear.data.tokenizer import load_tokenizer
from megatron_klear.errors import told_at_once
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.save import latest_valid
from megatron_klear.mcore.compare_logits import compare_with_transformers
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.runs.folder import checkpoints_of, prepare_folder, publishing, resolved_settings
from megatron_klear.runs.log import Throughput, open_log
from megatron_klear.train.gppo import resume, train
from megatron_klear.train.rollouts import Rollouts
from megatron_klear.train.turn_end import export_folder, stop_tokens_of, turns_of
from megatron_klear.train.weight_sync import open_trainer


def run(start: GPPOStart) -> None:
    """Train from the beginning or from the newest whole checkpoint of the run's folder, to the last rollout step."""
    config, architecture = start.config, start.architecture
    with (
        world(config.parallel, config.seed) as topology,
        prepare_folder(config, topology) as changed,
        Rollouts(start) as rollouts,
        told_at_once(),  # ending servers takes its time: an error is told before it
    ):
        tokenizer = load_tokenizer(config.model.path, config.prompts.chat_template)
        stop = stop_tokens_of(config.model.path, tokenizer)
        of_prompts = rollouts.read_prompts()
        updates = config.algorithm.prompts_per_step // config.algorithm.prompts_per_update
        engine = Engine(
            config,
            topology,
            total_steps=config.train.steps * updates,
            architecture=architecture,
            turns=turns_of(stop, config.prompts.chat_template),
        )
        if config.algorithm.kl_coefficient:
            engine.keep_reference(config.algorithm.reference)
        checkpoint = latest_valid(checkpoints_of(config), topology)
        first = 0 if checkpoint is None else int(manifest.read_training(checkpoint)["extra"]["rollout_step"])
        if topology.rank == 0:
            write_resolved(config, resolved_settings(config))
        device = torch.cuda.get_device_name() if topology.device.type == "cuda" else None
        throughput = Throughput.of(config, architecture, topology.size, device)
        with (
            ExitStack() as outputs,
            publishing(engine),
            closing(open_trainer(engine, config, stop.ids)) as trainer,
            told_at_once(),
        ):
            # Closed last: a tracker takes longer than ranks wait for each other to publish.
            log = outputs.enter_context(
                open_log(
                    config, rank=topology.rank, resume_step=first, total_steps=config.train.steps, throughput=throughput
                )
            )
            rollouts.tell, rollouts.trainer = log.say, trainer
            trainer.connect(rollouts.open())
            for warning in (*start.warnings, *changed, *of_prompts):
                log.say(f"warning: {warning}")
            for note in (stop.note, compare_with_transformers(engine) if checkpoint is None else ""):
                if note:
                    log.say(f"note: {note}")
            if checkpoint is not None:
                resume(engine, rollouts, checkpoint)
                log.say(f"resuming from {checkpoint}, rollout step {first} of {config.train.steps}")
            train(config, engine, rollouts, log, start=first)
        rollouts.close()
        if config.checkpoint.export_hf:
            export_folder(engine, config.output / "hf")
