"""config.json's rotary embedding: every form is read as transformers reads it, or refused with the keys named."""

import json
from pathlib import Path

import pytest
import torch

from megatron_klear.data.tiny import TinyShape, tiny_config
from megatron_klear.mcore.model import inverse_frequencies
from megatron_klear.mcore.reading import check_frequencies, transformers_frequencies
from megatron_klear.models.architecture import ArchitectureError, architecture_from_config, read_architecture
from megatron_klear.models.rope import Rope

POSITIONS, ORIGINAL = 128, 32
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TOP = {"original_max_position_embeddings": ORIGINAL}
DEFAULT_1M = {"rope_type": "default", "rope_theta": 1e6}
FORMS = {
    "nothing": {},
    "base alone": {"rope_theta": 1e6},
    "null scaling": {"rope_theta": 1e6, "rope_scaling": None},
    "empty scaling": {"rope_theta": 1e6, "rope_scaling": {}},
    "null parameters": {"rope_theta": 1e6, "rope_parameters": None},
    "as transformers 5 saves": {"rope_parameters": DEFAULT_1M},
    "as transformers 5 saves, base repeated": {"rope_theta": 1e6, "rope_parameters": DEFAULT_1M},
    "base beside parameters": {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
    "both tables alike": {"rope_parameters": DEFAULT_1M, "rope_scaling": DEFAULT_1M},
    "both tables alike, base in one": {
        "rope_theta": 1e6,
        "rope_parameters": YARN | TOP | {"rope_theta": 1e6},
        "rope_scaling": YARN | TOP,
    },
    "linear": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "linear, legacy type": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
    "linear in parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    "both names of the kind": {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 3},
    },
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3 | TOP},
    "llama3, original length at the top": {"rope_theta": 5e5, "rope_scaling": LLAMA3} | TOP,
    "llama3, original length left out": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama3 in parameters": {"rope_parameters": LLAMA3 | TOP | {"rope_theta": 5e5}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": YARN | TOP},
    "yarn, legacy type": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0} | TOP},
    "yarn, original length at the top": {"rope_theta": 1e6, "rope_scaling": YARN} | TOP,
    "yarn, original length in both": {"rope_theta": 1e6, "rope_scaling": YARN | TOP} | TOP,
    "yarn, original length left out": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn in parameters": {"rope_parameters": YARN | TOP | {"rope_theta": 1e6}},
    "yarn, factor from the lengths": {"rope_theta": 1e6, "rope_scaling": YARN | TOP | {"factor": None}},
    "yarn, betas": {"rope_theta": 1e6, "rope_scaling": YARN | TOP | {"beta_fast": 16, "beta_slow": 2.0}},
    "yarn, null betas": {"rope_theta": 1e6, "rope_scaling": YARN | TOP | {"beta_fast": None, "beta_slow": None}},
    "yarn, mscale": {"rope_theta": 1e6, "rope_scaling": YARN | TOP | {"mscale": 1.2, "mscale_all_dim": 0.8}},
    "yarn, mscale alone": {"rope_theta": 1e6, "rope_scaling": YARN | TOP | {"mscale": 1.2}},
    "yarn, attention_factor": {"rope_theta": 1e6, "rope_scaling": YARN | TOP | {"attention_factor": 1.3}},
    "yarn, not truncated": {"rope_theta": 1e4, "rope_scaling": YARN | TOP | {"truncate": False}},
    "yarn, truncate null": {"rope_theta": 1e4, "rope_scaling": YARN | TOP | {"truncate": None}},
    "keys of another kind": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0} | TOP},
    "whole head rotated": {"rope_theta": 1e6, "rope_scaling": YARN | TOP | {"partial_rotary_factor": 1.0}},
}
REFUSED = {
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "longrope": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    "scaling beside default parameters": (
        {"rope_parameters": DEFAULT_1M, "rope_scaling": YARN | TOP},
        r"rope_scaling and rope_parameters contradict.*yarn with rope_theta 10000.*default with rope_theta 1e\+06",
    ),
    "two factors": (
        {"rope_theta": 1e6, "rope_parameters": YARN | TOP, "rope_scaling": YARN | TOP | {"factor": 2.0}},
        "rope_scaling and rope_parameters contradict",
    ),
    "two bases": ({"rope_theta": 1e4, "rope_parameters": DEFAULT_1M}, r"rope_theta 1000000\.0 contradicts rope_theta"),
    "two original lengths": (
        {"rope_scaling": YARN | TOP, "original_max_position_embeddings": 64},
        "original_max_position_embeddings 32 contradicts original_max_position_embeddings 64 at the top level",
    ),
    "two kinds": ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}, "rope_type 'linear' contr"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is None, expected a number"),
    "no frequencies": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
    "factor as text": ({"rope_scaling": YARN | {"factor": "4"}}, "factor is '4'"),
    "factor of nothing": ({"rope_scaling": YARN | {"factor": 0}}, "factor is 0, expected a number above 0"),
    "base as text": ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
    "no table": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected a table"),
    "half the head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    "a table a kind of layer": ({"rope_parameters": {"full_attention": DEFAULT_1M}}, "full_attention.*not supported"),
}


def config(family: str, form: dict[str, object]) -> dict[str, object]:
    plain = tiny_config(family, TinyShape(max_positions=POSITIONS))
    return {name: value for name, value in plain.items() if name != "rope_theta"} | form


def write(folder: Path, family: str, form: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(config(family, form)))
    return folder


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_frequencies_are_those_of_transformers(tmp_path: Path, form: str, family: str):
    folder = write(tmp_path, family, FORMS[form])
    ours, scaling = inverse_frequencies(read_architecture(folder))
    theirs, their_scaling, _ = transformers_frequencies(folder / "config.json")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert scaling == pytest.approx(their_scaling, rel=1e-9)
    check_frequencies(read_architecture(folder), folder)


@pytest.mark.parametrize("form", ["base alone", "linear", "llama3, original length at the top", "yarn, mscale"])
def test_the_comparison_is_with_the_buffers_of_a_model_of_transformers(tmp_path: Path, form: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = write(tmp_path, "qwen3", FORMS[form])
    rotary = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).model.rotary_emb
    frequencies, scaling, _ = transformers_frequencies(folder / "config.json")
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-6, atol=0)
    assert scaling == rotary.attention_scaling


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_computed_or_contradicts_itself_is_refused(form: str):
    settings, message = REFUSED[form]
    with pytest.raises(ArchitectureError, match=message):
        architecture_from_config(config("qwen3", settings))


def test_a_wrong_reading_is_told_before_anything_is_built(tmp_path: Path):
    from dataclasses import replace

    folder = write(tmp_path, "qwen3", FORMS["yarn"])
    right = read_architecture(folder)
    for rope in (Rope(theta=1e6), replace(right.rope, theta=1e4)):
        with pytest.raises(ArchitectureError, match=r"config\.json: the rotary embedding is read as"):
            check_frequencies(replace(right, rope=rope), folder)
