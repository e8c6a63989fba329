"""Wiring of a reinforcement-learning run: the rooms are opened here, the loop is in `gppo.py`."""

from __future__ import annotations

from contextlib import ExitStack, closing

import torch

from megatron_klear.config.checks import check_prompt_tokens
from megatron_klear.config.read import write_resolved
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.config.start import GPPOStart
from megatron_klear.data.prompts import PromptStream
from megatron_klear.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_klear.errors import told_at_once
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.save import latest_valid
from megatron_klear.mcore.compare_logits import compare_with_transformers
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.model import DTYPES, inverse_frequencies
from megatron_klear.mcore.topology import Topology, world
from megatron_klear.models.architecture import Architecture
from megatron_klear.rollout.engine import RolloutEngine
from megatron_klear.rollout.local.decoder import Decoder
from megatron_klear.rollout.local.engine import LocalEngine
from megatron_klear.rollout.vllm.open import open_vllm
from megatron_klear.runs.folder import checkpoints_of, prepare_folder, publishing, resolved_settings
from megatron_klear.runs.log import RunLog, Throughput, open_log
from megatron_klear.runs.rollout_files import RolloutWriter
from megatron_klear.train.gppo import resume, train
from megatron_klear.train.grading import Grader, check_prompts
from megatron_klear.train.overlap import open_feed
from megatron_klear.train.sampler import Sampler
from megatron_klear.train.turn_end import export_folder, stop_tokens_of, turns_of
from megatron_klear.train.validation import Validator
from megatron_klear.train.weight_sync import send_weights
from megatron_klear.types import Prompt

_GRACE_SECONDS = 60.0
"""For the engine to drop by itself what is past rollout.deadline_seconds."""


def run(start: GPPOStart) -> None:
    """Train from the beginning or from the newest whole checkpoint of the run's folder, to the last rollout step."""
    config, architecture = start.config, start.architecture
    with world(config.parallel, config.seed) as topology, prepare_folder(config, topology) as changed:
        tokenizer = load_tokenizer(config.model.path, config.prompts.chat_template)
        validator = _validator(config, tokenizer, topology)
        kept = _writer(config, topology, "rollouts", share=config.train.keep_rollouts_share)
        prompts = _prompts(config, tokenizer, validator)
        asked = [*prompts.all, *validator.prompts]
        check_prompts(config.reward, asked)
        check_prompt_tokens(config, architecture, asked)
        updates = config.algorithm.prompts_per_step // config.algorithm.prompts_per_update
        stop = stop_tokens_of(config.model.path, tokenizer)
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
            publishing(engine),
            closing(build_rollouts(config, architecture, tokenizer, topology)) as rollouts,
            told_at_once(),  # ending servers takes its time: the error is told before it
            Grader(config.reward, asked, topology.rank) as grader,
            open_log(
                config, rank=topology.rank, resume_step=first, total_steps=config.train.steps, throughput=throughput
            ) as log,
            ExitStack() as writers,
            told_at_once(),
        ):
            for writer in (kept, validator.kept):
                if writer is not None:
                    writers.enter_context(closing(writer))
            grader.wait_until_ready()
            for warning in (*start.warnings, *changed, *_few_prompts(config, len(prompts))):
                log.say(f"warning: {warning}")
            for note in (stop.note, compare_with_transformers(engine) if checkpoint is None else ""):
                if note:
                    log.say(f"note: {note}")
            sampler = build_sampler(config, engine, rollouts, log)
            feed = open_feed(config, sampler, prompts, grader, log)
            if checkpoint is not None:
                resume(engine, feed, checkpoint)
                log.say(f"resuming from {checkpoint}, rollout step {first} of {config.train.steps}")
            train(config, engine, sampler, feed, validator, grader, log, start=first, kept=kept)
        if config.checkpoint.export_hf:
            export_folder(engine, config.output / "hf")


def _prompts(config: GPPOConfig, tokenizer: ChatTokenizer, validator: Validator) -> PromptStream:
    """The problems to train on; the held-out ones are left out wherever they come from."""
    return PromptStream(
        config.prompts.sources,
        tokenizer,
        max_tokens=config.prompts.max_tokens,
        seed=config.seed,
        thinking=config.prompts.thinking,
        exclude=frozenset(prompt.id for prompt in validator.prompts),
    )


def _few_prompts(config: GPPOConfig, count: int) -> list[str]:
    """A warning where a step takes more prompts than there are."""
    taken = config.algorithm.generated_prompts or config.algorithm.prompts_per_step
    if count >= taken:
        return []
    return [f"prompts.sources hold {count} prompts and a step takes {taken}: some are sampled more than once in a step"]


def build_rollouts(
    config: GPPOConfig, architecture: Architecture, tokenizer: ChatTokenizer, topology: Topology
) -> RolloutEngine:
    """The rollout engine that `[rollout]` names."""
    stop = stop_tokens_of(config.model.path, tokenizer)
    if isinstance(config.rollout, VLLMRolloutConfig):
        return open_vllm(
            config,
            architecture,
            decode=tokenizer.decode,
            stop_token_ids=stop.ids,
            device=topology.device,
            rank=topology.rank,
            world_size=topology.size,
        )
    frequencies, scaling = inverse_frequencies(architecture)
    dtype = torch.float32 if config.rollout.dtype == "fp32" else DTYPES[config.model.dtype]
    return LocalEngine(
        Decoder(architecture, frequencies, scaling, dtype, topology.device),
        decode=tokenizer.decode,
        stop_token_ids=stop.ids,
        max_sequences=config.rollout.max_sequences,
    )


def build_sampler(config: GPPOConfig, engine: Engine, rollouts: RolloutEngine, log: RunLog) -> Sampler:
    """The rollout engine with the way to it, and the limits that `[rollout]` sets."""
    if not isinstance(config.rollout, VLLMRolloutConfig):
        return Sampler(rollouts, lambda version: send_weights(engine, rollouts, version))
    tolerance = config.rollout.probe_tolerance
    return Sampler(
        rollouts,
        lambda version: send_weights(engine, rollouts, version, tolerance=tolerance),
        patience_seconds=config.rollout.deadline_seconds + _GRACE_SECONDS,
        max_dropped_share=config.rollout.max_dropped_share,
        tell=log.say,
    )


def _validator(config: GPPOConfig, tokenizer: ChatTokenizer, topology: Topology) -> Validator:
    """The held-out problems; training leaves them out wherever they come from."""
    held_out: list[Prompt] = []
    if config.validation.sources:
        stream = PromptStream(
            config.validation.sources,
            tokenizer,
            max_tokens=config.prompts.max_tokens,
            seed=config.seed + 1,
            thinking=config.prompts.thinking,
            key="validation.sources",
        )
        held_out = stream.all
    return Validator(config=config.validation, prompts=held_out, kept=_writer(config, topology, "validation"))


def _writer(config: GPPOConfig, topology: Topology, folder: str, share: float = 1.0) -> RolloutWriter | None:
    """What writes samples into a folder of the run, on rank 0; None on the others and where none are kept."""
    if not config.train.keep_rollouts or topology.rank != 0:
        return None
    of = config.train
    return RolloutWriter(config.output / folder, share=share, keep_steps=of.keep_rollouts_steps, form=of.rollout_format)
