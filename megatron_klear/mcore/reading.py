"""Whether config.json is read as transformers reads it: a wrong reading trains another model without a word."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from megatron_klear.mcore.model import inverse_frequencies
from megatron_klear.models.architecture import Architecture, ArchitectureError

_TOLERANCE = 1e-5
"""Relative; both are fp32 powers of the base."""


def check_frequencies(architecture: Architecture, folder: Path) -> None:
    """Compare the rotary inverse frequencies with those that transformers derives from the folder's config.json.

    Takes milliseconds and no weights. Raises ArchitectureError with both readings where they differ.
    """
    path = Path(folder) / "config.json"
    theirs, their_scaling, reading = transformers_frequencies(path)
    ours, scaling = inverse_frequencies(architecture)
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=0.0)
    if not same or abs(scaling - their_scaling) > _TOLERANCE * their_scaling:
        raise ArchitectureError(
            f"{path}: the rotary embedding is read as {architecture.rope}, and transformers reads {reading}; write it "
            "as transformers saves it, all of it in rope_parameters, and please report this config"
        )


def transformers_frequencies(path: Path) -> tuple[Tensor, float, str]:
    """Inverse frequencies [head_dim / 2] fp32 and factor on cosine and sine that transformers takes from a config.json.

    Also its reading of the settings, in words. Goes the way of `from_pretrained`, but for code beside the config.
    """
    from transformers import CONFIG_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = json.loads(path.read_text(encoding="utf-8"))
    config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    config.standardize_rope_params()  # once more, as its own functions do: some keys are attributes only now
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return frequencies.float(), float(scaling), str(rope)
    # The unscaled kind has no entry of its own: every model class has this formula.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0, str(rope)
