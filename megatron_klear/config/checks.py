"""Mistakes that show once the model's shape, the number of processes and the files are known; found before any work.

Each function returns sentences that name the key and the remedy, none when all is well. No torch is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_klear.config.base import RunConfig, SFTConfig
from megatron_klear.config.checks_experts import check_experts, divisors
from megatron_klear.config.checks_fp8 import fp8_problems
from megatron_klear.config.checks_lora import adapter_problems, lora_problems
from megatron_klear.config.read import differences
from megatron_klear.data.sources import file_problem, find_files, nothing_found
from megatron_klear.errors import UserError
from megatron_klear.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron_klear.config.rl import GPPOConfig
    from megatron_klear.types import Prompt

Importable = Callable[[str], bool]


def importable(module: str) -> bool:
    """Whether a top-level module is installed, without importing it."""
    return importlib.util.find_spec(module) is not None


def check_run(config: SFTConfig, architecture: Architecture, world_size: int) -> list[str]:
    """Everything that keeps this run from starting with this model on this many processes."""
    return [*check_plan(config, architecture, world_size), *check_packages(config), *check_files(config)]


def check_plan(config: SFTConfig, architecture: Architecture, world_size: int) -> list[str]:
    """What of it is arithmetic: true on every machine."""
    return [*check_layout(config, architecture, world_size), *_check_batch(config, world_size)]


def offload_problems(config: RunConfig) -> list[str]:
    """What keeps `optimizer.cpu_offload` from relieving a card, as far as the settings tell."""
    if config.optimizer.cpu_offload == 0:
        return []
    key = f"optimizer.cpu_offload = {config.optimizer.cpu_offload:g}"
    problems = []
    if config.parallel.device == "cpu":
        problems.append(
            f"{key} moves optimizer state from a GPU to host memory, and parallel.device is cpu; set it to 0"
        )
    if not config.optimizer.distributed:
        problems.append(f"{key} needs optimizer.distributed = true, which its masters and moments are kept by")
    if config.model.dtype != "bf16":
        problems.append(f"{key} needs model.dtype = bf16, and it is {config.model.dtype}; change either")
    return problems


def activation_offload_problems(config: RunConfig) -> list[str]:
    """What keeps `offload.activations` from relieving a card, as far as the settings tell."""
    if not config.offload.activations:
        return []
    key = "offload.activations = true"
    problems = []
    if config.parallel.device == "cpu":
        problems.append(f"{key} moves activations from a GPU to host memory, and parallel.device is cpu; leave it out")
    if config.recompute.granularity == "selective" and config.recompute.repeats("layernorm"):
        problems.append(
            f"{key} would copy the outputs of norms, which recompute.modules lets go of: take one of the two"
        )
    if config.model.fp8 != "off":
        problems.append(
            f"{key} is not for model.fp8 = {config.model.fp8}, whose layers keep quantized tensors of theirs"
        )
    return problems


def check_resume(resolved: Path, config: RunConfig) -> tuple[list[str], list[str]]:
    """Errors and warnings of going on from a checkpoint of a run whose settings `write_resolved` left at `resolved`.

    Raises SettingsError when that file cannot be read.
    """
    errors, warnings = [], []
    for difference in differences(resolved, config):
        if difference.breaks_resume:
            errors.append(
                f"{difference} since the run in {config.output} was started, which its checkpoints do not go with; "
                "restore the setting or choose another output"
            )
        elif difference.key != "output":
            warnings.append(f"resuming with a changed setting: {difference}")
    return errors, warnings


def check_launch(environ: Mapping[str, str]) -> list[str]:
    """Whether a launcher started several processes that do not know of each other: each would be a run of its own."""
    if "WORLD_SIZE" in environ:
        return []
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or (environ.get("SLURM_NTASKS") if "SLURM_STEP_ID" in environ else None)
    counts = {
        "srun": tasks,
        "mpirun": environ.get("OMPI_COMM_WORLD_SIZE"),
        "mpiexec": environ.get("PMI_SIZE"),
    }
    return [
        f"{launcher} started {count} processes and WORLD_SIZE is not set: each would be a run of its own in the same "
        f"output; start one task a node that starts torchrun (srun --ntasks-per-node 1 torchrun ...)"
        for launcher, count in counts.items()
        if count is not None and count.isdigit() and int(count) > 1
    ][:1]


def check_stop_tokens(config: GPPOConfig, architecture: Architecture) -> list[str]:
    """Whether every token that ends a response is one that the model can write."""
    asked = {"sampling.stop_token_ids": config.sampling.stop_token_ids}
    if config.validation.sources:
        asked["validation.sampling.stop_token_ids"] = config.validation.sampling.stop_token_ids
    return [
        f"{key} names token {token}, and the model's vocab_size is {architecture.vocab_size}: it never writes that "
        f"token; name one below it"
        for key, tokens in asked.items()
        for token in tokens
        if token >= architecture.vocab_size
    ]


def check_prompt_tokens(config: GPPOConfig, architecture: Architecture, prompts: Sequence[Prompt]) -> None:
    """Raise UserError, the same on every rank, where a prompt holds a token that the model's embedding lacks."""
    for prompt in prompts:
        largest = int(prompt.tokens.max(initial=0))
        if largest >= architecture.vocab_size:
            raise UserError(
                f"{prompt.place or prompt.id}: the prompt holds token id {largest}, and config.json of model.path "
                f"{config.model.path} has vocab_size {architecture.vocab_size}: tokenizer and model do not belong "
                "together; use the tokenizer that the model was trained with"
            )


def warn_rl_run(config: GPPOConfig, architecture: Architecture) -> list[str]:
    """What of a reinforcement-learning run works but is likely not meant."""
    limit, prompt = architecture.max_positions, config.prompts.max_tokens
    asked = [("sampling.max_tokens", config.sampling.max_tokens)]
    if config.validation.sources:
        asked.append(("validation.sampling.max_tokens", config.validation.sampling.max_tokens))
    return [
        f"prompts.max_tokens {prompt} + {key} {tokens} is above the model's max_position_embeddings {limit}: positions "
        f"it never saw; extend its RoPE (rope_scaling in config.json) or lower {key}"
        for key, tokens in asked
        if prompt + tokens > limit
    ]


def warn_run(config: SFTConfig, architecture: Architecture) -> list[str]:
    """What works but is likely not meant."""
    warnings = []
    if config.data.max_length > architecture.max_positions:
        warnings.append(
            f"data.max_length {config.data.max_length} is above the model's max_position_embeddings "
            f"{architecture.max_positions}: positions it never saw; extend its RoPE (rope_scaling in config.json) "
            "or lower data.max_length"
        )
    if config.data.max_length < config.data.tokens_per_microbatch and not config.data.packing:
        warnings.append(
            f"data.packing is off, so rows never reach data.tokens_per_microbatch {config.data.tokens_per_microbatch}"
        )
    if config.train.steps is not None and config.optimizer.warmup_steps >= config.train.steps:
        warnings.append(
            f"optimizer.warmup_steps {config.optimizer.warmup_steps} covers all train.steps {config.train.steps}: "
            "the learning rate never decays"
        )
    return warnings


def check_layout(config: RunConfig, architecture: Architecture, world_size: int) -> list[str]:
    """Whether the model divides over the layout, and the layout over the processes."""
    parallel = config.parallel
    tensor = parallel.tensor
    errors = []
    if world_size % parallel.model_size:
        errors.append(
            f"{world_size} processes do not divide into replicas of parallel.tensor {tensor} x parallel.pipeline "
            f"{parallel.pipeline} x parallel.context {parallel.context} = {parallel.model_size}; start a multiple of "
            f"{parallel.model_size} with torchrun or change the layout"
        )
    divided = [
        ("num_attention_heads", architecture.num_heads),
        ("num_key_value_heads", architecture.num_kv_heads),  # each is held by one rank
    ]
    if architecture.experts is None:
        divided.append(("intermediate_size", architecture.ffn_hidden_size))
    errors += [
        f"parallel.tensor {tensor} does not divide the model's {name} {size}; use {divisors(size, tensor)}"
        for name, size in divided
        if size % tensor
    ]
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if architecture.num_layers % chunks:
        errors.append(
            f"the model's num_hidden_layers {architecture.num_layers} is not a multiple of parallel.pipeline "
            f"{parallel.pipeline} x parallel.virtual_pipeline {parallel.virtual_pipeline}; every chunk holds equally "
            f"many layers, so their product must be one of {divisors(architecture.num_layers, chunks)}"
        )
    return [
        *errors,
        *_check_recompute(config, architecture),
        *check_experts(config, architecture, world_size),
        *offload_problems(config),
        *activation_offload_problems(config),
        *lora_problems(config, architecture),
        *fp8_problems(config, architecture),
    ]


def _check_recompute(config: RunConfig, architecture: Architecture) -> list[str]:
    """Megatron's blocks of full recomputation must end with the layers of a chunk: it goes past them, and fails."""
    recompute, chunks = config.recompute, config.parallel.pipeline * config.parallel.virtual_pipeline
    layers = architecture.num_layers // chunks
    if recompute.granularity != "full" or recompute.method == "block" or layers % recompute.layers == 0:
        return []
    return [
        f"recompute.layers {recompute.layers} does not divide the {layers} layers that follow each other on a rank; "
        f"use {divisors(layers, recompute.layers)}"
    ]


def _check_batch(config: SFTConfig, world_size: int) -> list[str]:
    parallel, rows = config.parallel, config.train.rows_per_step
    if world_size % parallel.model_size:
        return []
    ranks = world_size // parallel.model_size
    if rows % ranks:
        fitting = sorted({max(rows // ranks, 1) * ranks, (rows // ranks + 1) * ranks})
        return [
            f"train.rows_per_step {rows} is not a multiple of the {ranks} data-parallel ranks ({world_size} processes, "
            f"{parallel.model_size} a replica); use {' or '.join(map(str, fitting))}"
        ]
    microbatches = rows // ranks
    if parallel.virtual_pipeline > 1 and microbatches % parallel.pipeline:
        return [
            f"with parallel.virtual_pipeline {parallel.virtual_pipeline} a rank's {microbatches} micro-batches a "
            f"step must be a multiple of parallel.pipeline {parallel.pipeline}; set train.rows_per_step to a multiple "
            f"of {ranks * parallel.pipeline}"
        ]
    return []


def check_packages(config: RunConfig, importable: Importable = importable) -> list[str]:
    """Whether what the settings ask for by name is installed and goes with the device."""
    model, cpu = config.model, config.parallel.device == "cpu"
    needs_engine = [
        key
        for key, asked in (
            ("model.transformer_engine = on", model.transformer_engine == "on"),
            (f"model.fp8 = {model.fp8}", model.fp8 != "off"),
        )
        if asked
    ]
    errors = [f"{key} needs a GPU, and parallel.device is cpu; switch it off" for key in needs_engine if cpu]
    if not importable("transformer_engine"):
        errors += [
            f"{key} needs transformer-engine, not installed: pip install 'megatron-klear[te]', or switch it off"
            for key in needs_engine
        ]
    if model.fp8 != "off" and model.transformer_engine == "off":
        errors.append(f"model.fp8 = {model.fp8} runs through transformer-engine, and model.transformer_engine is off")
    if model.fp8 != "off" and model.dtype == "fp32":
        errors.append(f"model.fp8 = {model.fp8} needs model.dtype = bf16")
    if model.attention in ("flash", "varlen") and cpu:
        errors.append(f"model.attention = {model.attention} needs a GPU, and parallel.device is cpu; use auto or sdpa")
    if model.attention == "flash" and not importable("flash_attn"):
        errors.append("model.attention = flash needs flash-attn, which is not installed; use auto or varlen")
    if config.optimizer.implementation == "fused" and not (importable("apex") or importable("transformer_engine")):
        errors.append(
            "optimizer.implementation = fused needs NVIDIA Apex or transformer-engine neither installed; use auto"
        )
    if config.logging.wandb_project is not None and not importable("wandb"):
        errors.append(
            "logging.wandb_project is set, wandb is not installed: pip install 'megatron-klear[wandb]', or leave it out"
        )
    if config.logging.tensorboard and not importable("tensorboard"):
        errors.append(
            "logging.tensorboard is on, tensorboard is not installed: pip install tensorboard, or set it false"
        )
    return errors


def check_grading(config: GPPOConfig, importable: Importable = importable) -> list[str]:
    """Whether what grades is installed."""
    if config.reward.backend == "ray" and not importable("ray"):
        return ["reward.backend = ray, and ray is not installed: pip install 'megatron-klear[ray]', or use local"]
    return []


def check_files(config: SFTConfig) -> list[str]:
    """Whether the files that the settings name are there and the output folder can be written."""
    errors = [*_check_model_folder(config), *check_output(config.output)]
    for key, patterns in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        for pattern in patterns:
            errors += _check_pattern(key, pattern)
    template = config.data.chat_template
    if template is not None and not template.is_file():
        errors.append(f"data.chat_template {template}: there is no such file; leave it out to use the tokenizer's own")
    return errors


def check_prompt_files(config: GPPOConfig) -> list[str]:
    """Whether the files that a reinforcement-learning run names are there and its output folder can be written."""
    errors = [*_check_model_folder(config), *check_output(config.output)]
    for key, sources in (
        ("prompts.sources", config.prompts.sources),
        ("validation.sources", config.validation.sources),
    ):
        for pattern in (pattern for source in sources for pattern in source.files):
            errors += _check_pattern(key, pattern)
    template = config.prompts.chat_template
    if template is not None and not template.is_file():
        errors.append(f"prompts.chat_template {template}: there is no such file; leave it out to use the tokenizer's")
    reference = config.algorithm.reference
    if config.algorithm.kl_coefficient and reference is not None and not (reference / "config.json").is_file():
        errors.append(f"algorithm.reference {reference} is not a Hugging Face model folder: it has no config.json")
    return errors


def _check_pattern(key: str, pattern: str) -> list[str]:
    paths = find_files(pattern)
    if not paths:
        return [f"{key}: {nothing_found(pattern)}"]
    return [f"{key}: {problem}" for path in paths if (problem := file_problem(path))]


def _check_model_folder(config: RunConfig) -> list[str]:
    model = config.model
    if not model.path.is_dir():
        return [f"model.path {model.path}: there is no such folder; it must hold config.json, tokenizer and weights"]
    errors = []
    if not any((model.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        errors.append(f"model.path {model.path} has no tokenizer (tokenizer.json); copy it from the model's source")
    if model.checkpoint is not None and not model.checkpoint.is_dir():
        errors.append(f"model.checkpoint {model.checkpoint}: there is no such folder")
    reads_weights = model.weights == "pretrained" and model.checkpoint is None
    if reads_weights and not any(model.path.glob("*.safetensors")):
        errors.append(
            f"model.path {model.path} has no *.safetensors weights; download them, or set model.weights = random"
        )
    if model.weights == "random" and model.checkpoint is not None:
        errors.append("model.weights = random and model.checkpoint exclude each other; keep one")
    return errors + adapter_problems(config)


def check_output(output: Path) -> list[str]:
    """Whether the output folder exists or can be made, and can be written."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [f"output {output}: {existing} is a file, not a folder; choose another output"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"output {output}: {existing} cannot be written; check its permissions or choose another output"]
    return []
