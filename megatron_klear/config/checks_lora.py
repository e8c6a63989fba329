"""What keeps adapters from being trained on a model, told before the run. No torch is imported."""

from __future__ import annotations

from megatron_klear.config.base import LoraConfig, RunConfig
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.peft import AdapterError, AdapterForm, read_adapter_form
from megatron_klear.models.projections import projections


def adapted_matrices(settings: LoraConfig, architecture: Architecture) -> tuple[str, ...]:
    """Names of the matrices of a layer that get an adapter, in the order of the layer."""
    every = projections(architecture)
    return tuple(every) if settings.targets == ("all",) else tuple(name for name in every if name in settings.targets)


def adapter_sent(settings: LoraConfig | None, architecture: Architecture) -> AdapterForm | None:
    """The form of the adapters that samplers are sent by themselves; None where they are sent whole weights."""
    if settings is None or settings.sync == "merged":
        return None
    targets = adapted_matrices(settings, architecture)
    return AdapterForm(rank=settings.rank, alpha=settings.alpha, targets=targets)


def lora_problems(config: RunConfig, architecture: Architecture) -> list[str]:
    """What of the other settings, or of the model, does not go with `[lora]`."""
    if config.lora is None:
        return []
    missing = [name for name in config.lora.targets if name != "all" and name not in projections(architecture)]
    problems = [
        f"lora.targets names {name}, and a layer of {config.model.path} has no such matrix that an adapter can be put "
        "on (experts have none); leave it out"
        for name in missing
    ]
    if config.model.transformer_engine == "on" or config.model.fp8 != "off":
        problems.append(
            "[lora] puts adapters on Megatron's own linear layers: set model.transformer_engine to auto or off, and "
            "model.fp8 to off"
        )
    if config.optimizer.cpu_offload:
        problems.append(
            f"optimizer.cpu_offload = {config.optimizer.cpu_offload:g} has nothing to win with [lora], whose optimizer "
            "state is that of the adapters alone; set it to 0"
        )
    return problems


def adapter_problems(config: RunConfig) -> list[str]:
    """What is wrong with the folder that `lora.adapter` names, as far as its settings tell; its tensors tell the rest.

    With targets of `all` they alone say whether it has all.
    """
    if config.lora is None or config.lora.adapter is None:
        return []
    folder = config.lora.adapter
    try:
        form = read_adapter_form(folder)
    except AdapterError as error:
        return [f"lora.adapter: {error}"]
    problems = [
        f"lora.adapter {folder} has {what} {found:g}, and lora.{what} is {asked:g}; set it to {found:g}"
        for what, found, asked in (("rank", form.rank, config.lora.rank), ("alpha", form.alpha, config.lora.alpha))
        if found != asked
    ]
    targets = config.lora.targets
    if targets != ("all",) and set(form.targets) != set(targets):
        problems.append(
            f"lora.adapter {folder} adapts {', '.join(sorted(form.targets))}, and lora.targets asks for "
            f"{', '.join(sorted(targets))}; set it to {sorted(form.targets)}"
        )
    return problems
