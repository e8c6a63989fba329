"""Whole-model conversion between a Hugging Face folder and a Megatron checkpoint, proven before it is published.

The result is written under a hidden name, loaded back, compared tensor by tensor, bit for bit, and in a forward pass
against transformers; only then does it get its name. Everything runs on the CPU.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from megatron_klear.config.base import ModelConfig, ParallelConfig, RunConfig
from megatron_klear.distributed import exchange
from megatron_klear.mcore import weights as hf
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints import save as checkpoint
from megatron_klear.mcore.checkpoints.adapters import Base
from megatron_klear.mcore.lora import fold
from megatron_klear.mcore.lora_weights import base_checksum
from megatron_klear.mcore.model import DTYPES, PolicyModel, build_chunks, inverse_frequencies
from megatron_klear.mcore.processes import run_processes
from megatron_klear.mcore.rows import local_row
from megatron_klear.mcore.topology import Topology, world
from megatron_klear.mcore.weights import ConversionError
from megatron_klear.models import safetensors_io
from megatron_klear.models.architecture import Architecture, read_architecture
from megatron_klear.models.names import expected_tensors
from megatron_klear.models.safetensors_io import SafetensorsWriter, TensorSpec
from megatron_klear.models.stop_tokens import Turns
from megatron_klear.types import PackedBatch

DtypeName = Literal["bf16", "fp32"]
LOGIT_TOLERANCE = 1e-4
_CHECK_LENGTHS = (5, 40)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was proven of a conversion before it was published."""

    tensors: int
    """Tensors found bitwise equal in the result loaded back."""
    parameters: int
    dtype: str
    logit_difference: float | None
    """Largest difference to transformers' logits in fp32, relative to the largest logit (or 1); None if not run."""

    def __str__(self) -> str:
        """One line for people."""
        forward = (
            "forward pass not compared"
            if self.logit_difference is None
            else f"logits within {self.logit_difference:.1e} of transformers'"
        )
        return f"{self.tensors} tensors bitwise equal ({self.parameters:,} parameters, {self.dtype}); {forward}"


def hf_to_megatron(
    source: Path,
    out: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    dtype: DtypeName | None = None,
    force: bool = False,
    forward_check: bool = True,
) -> Verdict:
    """Convert the Hugging Face folder `source` into a checkpoint of weights at `out`.

    Works in tensor * pipeline processes; the checkpoint loads in any layout. `dtype` None keeps the stored precision
    (fp32 unless all weights are bf16). Raises ConversionError, SafetensorsError or ArchitectureError on bad input,
    before work starts, and ConversionError when the result does not prove equal; `out` is then as it was.
    """
    out = Path(out).absolute()
    safetensors_io.check_writable(out, force)
    architecture = read_architecture(source)
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=False, device="cpu")
    hf.check_divisible(architecture, parallel)
    weights = hf.open_weights(architecture, source)
    stored = {spec.dtype for spec in weights.specs.values()}
    name: DtypeName = dtype or ("bf16" if stored == {torch.bfloat16} else "fp32")
    _check_memory(architecture, forward_check)
    run = _run_config(source, name, parallel)
    staging = _staging(out)
    try:
        with tempfile.TemporaryDirectory(prefix="convert-") as companions:
            manifest.copy_model_files(source, Path(companions))
            safetensors_io.state_dtype(Path(companions), DTYPES[name])
            run_processes(tensor * pipeline, write_checkpoint, run, staging, Path(companions))
        difference = compare_forward(staging, source, name) if forward_check else None
        safetensors_io.publish(staging, out, force)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Verdict(
        tensors=len(expected_tensors(architecture)),
        parameters=architecture.num_parameters,
        dtype=name,
        logit_difference=difference,
    )


def megatron_to_hf(
    source: Path,
    out: Path,
    *,
    base: Path | None = None,
    max_shard_bytes: int = safetensors_io.DEFAULT_SHARD_BYTES,
    force: bool = False,
    forward_check: bool = True,
) -> Verdict:
    """Convert the checkpoint `source` (of training, or of `hf_to_megatron`) into a Hugging Face folder at `out`.

    Weights keep their precision. Adapters are merged into `base`, the model they were trained on, a Hugging Face folder
    or a checkpoint. Raises CheckpointError when `source` is damaged or of another base, ConversionError when the result
    does not prove equal; `out` is then as it was.
    """
    safetensors_io.check_writable(Path(out), force)
    manifest.read_training(source)
    problems = manifest.damage(source)
    if problems:
        raise manifest.CheckpointError(f"{source} is damaged: {'; '.join(problems[:3])}")
    architecture = read_architecture(source / "hf")
    _check_memory(architecture, forward_check)
    name = stored_dtype(source)
    plan = expected_tensors(architecture, DTYPES[name])
    difference = None
    run = _run_config(source / "hf", name, ParallelConfig(sequence=False, device="cpu"))
    adapted = Base.read(source) if base is not None else None
    run = run if adapted is None else run.model_copy(update={"lora": adapted.settings()})
    with safetensors_io.staged_folder(out, force) as staging, world(run.parallel) as topology:
        chunks = build_chunks(architecture, run, topology)
        if base is None or adapted is None:
            checkpoint.load_weights(source, chunks, topology)
        else:
            _load_merged(source, base, adapted, chunks, architecture, topology)
        weights = hf.iter_hf_weights(chunks, architecture, topology)
        _write_folder(staging, weights, plan, source / "hf", max_shard_bytes)
        written = hf.open_weights(architecture, staging)
        unequal = differing(hf.iter_hf_weights(chunks, architecture, topology), written.tensor)
        _refuse(unequal, f"the weights written for {out}")
        if forward_check:
            difference = _logit_difference(chunks, architecture, topology, staging)
    return Verdict(tensors=len(plan), parameters=architecture.num_parameters, dtype=name, logit_difference=difference)


def _load_merged(
    source: Path, base: Path, adapted: Base, chunks: list[PolicyModel], architecture: Architecture, topology: Topology
) -> None:
    """Read `base`, prove that it is the one under the adapters of `source`, and merge these into it."""
    if (base / manifest.TRAINING).is_file():
        checkpoint.load_weights(base, chunks, topology)
    else:
        hf.load_hf_weights(chunks, architecture, base, topology)
    found = replace(adapted, model=str(base), sha256=base_checksum(chunks, architecture, topology))
    checkpoint.load_adapters(source, chunks, found, topology)
    fold(chunks)


def export_hf(
    weights: Iterator[tuple[str, Tensor]],
    architecture: Architecture,
    model_folder: Path,
    out: Path,
    *,
    writer: bool,
    turns: Turns | None = None,
) -> None:
    """Write a model's weights, drawn on every rank, as a Hugging Face folder at `out`, replacing what is there.

    The rank that is the `writer` writes; config.json and tokenizer come from `model_folder`, with the end of turn
    and the chat template of `turns`.
    """
    name, first = next(weights)
    drawn = chain([(name, first)], weights)
    if not writer:
        for _ in drawn:
            pass
        return
    with safetensors_io.staged_folder(out, force=True) as staging:
        plan = expected_tensors(architecture, first.dtype)
        _write_folder(staging, drawn, plan, model_folder, safetensors_io.DEFAULT_SHARD_BYTES, turns)


def _write_folder(
    staging: Path,
    weights: Iterator[tuple[str, Tensor]],
    plan: list[TensorSpec],
    model_folder: Path,
    max_shard_bytes: int,
    turns: Turns | None = None,
) -> None:
    manifest.copy_model_files(model_folder, staging, turns)
    safetensors_io.state_dtype(staging, plan[0].dtype)
    with SafetensorsWriter(staging, plan, max_shard_bytes) as writer:
        for name, whole in weights:
            writer.write(name, whole)


def write_checkpoint(run: RunConfig, path: Path, companions: Path) -> None:
    """On every process of the layout: load the Hugging Face weights, save them at `path`, read that back and compare.

    `companions` holds the config.json and tokenizer files that go with them. Raises ConversionError on every process
    when a tensor does not come back bit for bit.
    """
    with world(run.parallel) as topology:
        architecture = read_architecture(run.model.path)
        chunks = build_chunks(architecture, run, topology)
        hf.load_hf_weights(chunks, architecture, run.model.path, topology)
        checkpoint.save_weights(path, chunks, topology, companions)
        _forget(chunks)
        checkpoint.load_weights(path, chunks, topology)
        weights = hf.open_weights(architecture, run.model.path)
        dtype = DTYPES[run.model.dtype]
        unequal = differing(
            hf.iter_hf_weights(chunks, architecture, topology),
            (lambda name: weights.tensor(name).to(dtype)) if topology.rank == 0 else None,
        )
        _refuse(exchange.tell_all(unequal), f"the checkpoint of {run.model.path}")


def compare_forward(path: Path, model_folder: Path, dtype: DtypeName) -> float:
    """Load a checkpoint in one process and compare its logits with transformers' on `model_folder`'s weights.

    Both sides run in fp32 on the weights rounded to `dtype`. Returns the relative difference; raises ConversionError
    when it is above LOGIT_TOLERANCE.
    """
    run = _run_config(path / "hf", dtype, ParallelConfig(sequence=False, device="cpu"))
    with world(run.parallel) as topology:
        architecture = read_architecture(path / "hf")
        chunks = build_chunks(architecture, run, topology)
        checkpoint.load_weights(path, chunks, topology)
        return _logit_difference(chunks, architecture, topology, model_folder, DTYPES[dtype])


def differing(weights: Iterable[tuple[str, Tensor]], original: Callable[[str], Tensor] | None) -> list[str]:
    """Names whose tensors differ in a bit; draws every weight, and compares none where `original` is None."""
    unequal = []
    for name, whole in weights:
        if original is None:
            continue
        expected = original(name)
        same = expected.dtype == whole.dtype and expected.shape == whole.shape
        if not same or not torch.equal(_bits(expected), _bits(whole)):
            unequal.append(name)
    return unequal


def stored_dtype(path: Path) -> DtypeName:
    """Precision of a checkpoint's weights: bf16 where all are, else fp32."""
    dtypes = {spec.dtype for spec in checkpoint_tensors(path) if not spec.name.startswith("optimizer.")}
    return "bf16" if dtypes == {torch.bfloat16} else "fp32"


def checkpoint_tensors(path: Path) -> list[TensorSpec]:
    """Tensors that a checkpoint stores, under Megatron's names (all layers of a kind are one tensor), sorted.

    Raises CheckpointError when its metadata cannot be read.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        entries = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:
        raise manifest.CheckpointError(f"{path / '.metadata'} cannot be read: {error}") from error
    return [
        TensorSpec(name=name, shape=tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in sorted(entries.items())
        if isinstance(entry, TensorStorageMetadata)
    ]


@torch.no_grad()
def _logit_difference(
    chunks: list[PolicyModel],
    architecture: Architecture,
    topology: Topology,
    model_folder: Path,
    dtype: torch.dtype | None = None,
) -> float:
    batch = _check_batch(architecture)
    model = chunks[0].float().eval()
    frequencies = inverse_frequencies(architecture)[0].to(topology.device)
    row = local_row(batch, topology).on(topology.device, frequencies)
    hidden = model.run(row).squeeze(1)
    ours = torch.nn.functional.linear(hidden, model.head_weight[: architecture.vocab_size])
    reference = transformers_logits(model_folder, batch, dtype)
    scale = max(1.0, float(reference.abs().max()))
    difference = float((ours - reference).abs().max()) / scale
    if not difference <= LOGIT_TOLERANCE:
        raise ConversionError(
            f"logits differ from transformers' on {model_folder} by {difference:.1e} of the largest, more than "
            f"{LOGIT_TOLERANCE:.0e}; nothing was written"
        )
    return difference


def transformers_logits(folder: Path, batch: PackedBatch, dtype: torch.dtype | None = None) -> Tensor:
    """Logits [T, V] that transformers computes in fp32, each sequence by itself; weights rounded to `dtype` first."""
    import transformers
    from transformers import AutoModelForCausalLM

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    model = model.float().eval()
    bounds = batch.cu_seqlens.tolist()
    with torch.no_grad():
        logits = [model(batch.tokens[None, a:b]).logits[0] for a, b in pairwise(bounds)]
    return torch.cat(logits)


def _check_batch(architecture: Architecture) -> PackedBatch:
    lengths = [min(length, architecture.max_positions) for length in _CHECK_LENGTHS]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(architecture.vocab_size, (total,), generator=generator)
    bounds = [0, lengths[0], total]
    return PackedBatch(
        tokens=tokens,
        targets=torch.zeros_like(tokens),
        weights=torch.zeros(total),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )


@torch.no_grad()
def _forget(chunks: list[PolicyModel]) -> None:
    """Overwrite every parameter, so that only what is truly read back compares equal."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _refuse(unequal: list[str], what: str) -> None:
    if unequal:
        more = f" and {len(unequal) - 3} more" if len(unequal) > 3 else ""
        raise ConversionError(f"{what} read back differently: {', '.join(unequal[:3])}{more}; nothing was written")


def _staging(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"


def _run_config(folder: Path, dtype: DtypeName, parallel: ParallelConfig) -> RunConfig:
    model = ModelConfig(path=folder, dtype=dtype, attention="sdpa", transformer_engine="off", fused_loss=False)
    return RunConfig(output=folder, model=model, parallel=parallel)


def _check_memory(architecture: Architecture, forward_check: bool) -> None:
    """Refuse what cannot fit: the model once, and for the forward pass twice more in fp32."""
    needed = architecture.num_parameters * (4 if not forward_check else 12)
    available = psutil.virtual_memory().available
    if needed > available:
        remedy = "pass --no-forward-check" if forward_check else "use a machine with more memory"
        raise ConversionError(
            f"converting {architecture.num_parameters:,} parameters takes about {needed / 1e9:.0f} GB of memory and "
            f"{available / 1e9:.0f} GB are available; {remedy}"
        )
