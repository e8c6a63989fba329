"""An adapter's folder as PEFT writes and reads it: `adapter_config.json` beside `adapter_model.safetensors`.

No torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klear.errors import UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MUST_BE_UNSET = (
    *("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices", "layer_replication"),
    *("megatron_config", "exclude_modules", "use_qalora", "use_bdlora"),
)
"""Settings of PEFT that change what an adapter computes or where it is, and that are not implemented here."""

_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations after which the base is no more the folder it came from."""


class AdapterError(UserError, ValueError):
    """An adapter's folder that cannot be used; the message names the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterForm:
    """What an adapter_config.json says of its tensors."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def tensor_name(matrix: str, kind: str) -> str:
    """PEFT's name of factor `kind` (A or B) of the adapter of a Hugging Face matrix, named without `.weight`."""
    return f"base_model.model.{matrix}.lora_{kind}.weight"


def read_adapter_form(folder: Path) -> AdapterForm:
    """Read `folder/adapter_config.json`.

    Raises AdapterError where it is missing, malformed, or of another kind than plain LoRA on linear layers.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config["target_modules"]
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist: expected a folder that PEFT's save_pretrained wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is not the settings of an adapter: {error!r}") from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is of peft_type {config.get('peft_type')!r}; only LORA is supported")
    if str(config.get("init_lora_weights")) in _CHANGE_THE_BASE:
        raise AdapterError(f"{path} has init_lora_weights {config['init_lora_weights']!r}, which is of a changed base")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path} trains biases (bias {config['bias']!r}), which is not supported")
    set_ = [key for key in _MUST_BE_UNSET if config.get(key)]
    if set_:
        raise AdapterError(f"{path} sets {', '.join(set_)}, which is not supported")
    if not isinstance(targets, list):
        raise AdapterError(
            f"{path} has target_modules {targets!r}; expected the list of matrices that save_pretrained writes"
        )
    return AdapterForm(rank=rank, alpha=alpha, targets=tuple(str(name).rpartition(".")[2] for name in targets))


def write_adapter_config(folder: Path, form: AdapterForm, base: str) -> None:
    """Write `folder/adapter_config.json` of an adapter of the model `base`, a folder or a name."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": form.rank,
        "lora_alpha": form.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(form.targets),
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def expected_names(matrices: Sequence[str]) -> list[str]:
    """The tensors of an adapter of these matrices, A before B."""
    return [tensor_name(matrix, kind) for matrix in matrices for kind in "AB"]
