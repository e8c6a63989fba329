"""Checkpoints that hold adapters alone: the model they belong to, and their way to the files that PEFT reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from megatron_klear.config.base import LoraConfig, RunConfig
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.compare import read_tensors
from megatron_klear.mcore.checkpoints.manifest import CheckpointError
from megatron_klear.models import safetensors_io
from megatron_klear.models.peft import WEIGHTS_FILE, AdapterForm, tensor_name, write_adapter_config

BASE = "base"
"""Key of training.json."""
_STORED = re.compile(r"decoder\.layers\.(self_attention|mlp)\.\w+\.lora\.(\w+)_([AB])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The frozen model under adapters, and the form of these."""

    model: str
    """Where it was read from."""
    sha256: str
    """Over its weights, as `lora_weights.base_checksum` gives it: the same in every layout."""
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def of(cls, run: RunConfig, sha256: str, targets: tuple[str, ...]) -> Base:
        """That of a run with adapters."""
        assert run.lora is not None
        model = run.model
        drawn = f"{model.path} with random weights of seed {run.seed}" if model.weights == "random" else model.path
        return cls(
            model=str(model.checkpoint or drawn),
            sha256=sha256,
            rank=run.lora.rank,
            alpha=run.lora.alpha,
            targets=targets,
        )

    @classmethod
    def read(cls, path: Path) -> Base | None:
        """What a checkpoint says, None where it holds whole models. Raises CheckpointError where it is none."""
        said: dict[str, Any] | None = manifest.read_training(path).get(BASE)
        return None if said is None else cls(**{**said, "targets": tuple(said["targets"])})

    def to_json(self) -> dict[str, Any]:
        """For training.json."""
        return asdict(self)

    def settings(self) -> LoraConfig:
        """The `[lora]` table that makes these adapters."""
        return LoraConfig.model_validate({"rank": self.rank, "alpha": self.alpha, "targets": self.targets})


def check_base(path: Path, own: Base | None) -> None:
    """Raise CheckpointError unless the checkpoint at `path` is of adapters on the model `own`, or of none as well."""
    said = Base.read(path)
    if said is None and own is not None:
        raise CheckpointError(f"{path} holds a whole model, and [lora] trains adapters; choose another output")
    if said is not None and own is None:
        raise CheckpointError(f"{path} holds adapters of {said.model} alone; give the run its [lora] table back")
    if said is None or own is None:
        return
    if said.sha256 != own.sha256:
        raise CheckpointError(
            f"{path} holds adapters of {said.model}, whose weights (SHA-256 {said.sha256[:12]}) are not those of "
            f"{own.model} ({own.sha256[:12]}): on another base they mean nothing; restore the base"
        )
    different = [name for name in ("rank", "alpha", "targets") if getattr(said, name) != getattr(own, name)]
    if different:
        told = ", ".join(f"lora.{name} {getattr(said, name)} and not {getattr(own, name)}" for name in different)
        raise CheckpointError(f"{path} holds adapters of {told}; restore the setting")


def read_adapters(path: Path) -> tuple[AdapterForm, dict[str, Tensor]]:
    """The adapters of a checkpoint under PEFT's names, without a model; Megatron keeps all layers of a kind as one.

    Raises CheckpointError where `path` holds none.
    """
    base = Base.read(path)
    if base is None:
        raise CheckpointError(f"{path} holds a whole model and no adapters")
    stored = read_tensors(path, lambda name: _STORED.fullmatch(name) is not None)
    found = {}
    for name, layers in stored.items():
        match = _STORED.fullmatch(name)
        assert match is not None
        module = "self_attn" if match[1] == "self_attention" else match[1]
        for layer, tensor in enumerate(layers):
            found[layer, tensor_name(f"model.layers.{layer}.{module}.{match[2]}", match[3])] = tensor.clone()
    form = AdapterForm(rank=base.rank, alpha=base.alpha, targets=base.targets)
    return form, {name: found[layer, name] for layer, name in sorted(found)}


def megatron_to_peft(source: Path, out: Path, *, force: bool = False) -> int:
    """Write the adapters of a checkpoint as PEFT's folder at `out`; the number of tensors, all read back bit for bit.

    Raises CheckpointError where `source` is damaged or holds no adapters; `out` is then as it was.
    """
    safetensors_io.check_writable(Path(out), force)
    if problems := manifest.damage(source):
        raise CheckpointError(f"{source} is damaged: {'; '.join(problems[:3])}")
    form, tensors = read_adapters(source)
    base = Base.read(source)
    assert base is not None
    _write_peft_folder(out, form, base.model, tensors, force=force)
    return len(tensors)


def export_adapter(weights: Iterator[tuple[str, Tensor]], base: Base, out: Path, *, writer: bool) -> None:
    """Write adapters, drawn on every rank, as PEFT's folder at `out`; the rank that is the `writer` writes."""
    tensors = {name: whole.cpu() for name, whole in weights}
    if writer:
        form = AdapterForm(rank=base.rank, alpha=base.alpha, targets=base.targets)
        _write_peft_folder(out, form, base.model, tensors, force=True)


def _write_peft_folder(out: Path, form: AdapterForm, base: str, tensors: dict[str, Tensor], *, force: bool) -> None:
    with safetensors_io.staged_folder(out, force) as staging:
        write_adapter_config(staging, form, base)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        (staging / WEIGHTS_FILE).write_bytes(save(whole, metadata={"format": "pt"}))  # tells a full disk as an OSError
        written = load_file(staging / WEIGHTS_FILE)
        same = written.keys() == whole.keys() and all(torch.equal(written[name], whole[name]) for name in whole)
        if not same:
            raise CheckpointError(f"the adapter written for {out} read back differently; nothing was written")
