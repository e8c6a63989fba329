"""Weights that contradict their config.json are refused before anything is written, naming tensor and file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.errors import UserError
from megatron_klear.mcore.checkpoints.convert import hf_to_megatron
from megatron_klear.mcore.weights import open_weights
from megatron_klear.models.architecture import read_architecture

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """A fault: one tensor replaced."""
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


def without(name: str) -> Callable[[Tensors], Tensors]:
    """A fault: one tensor gone."""
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


FAULTS: dict[str, tuple[bool, Callable[[Tensors], Tensors], str]] = {
    "missing": (False, without(DOWN), rf"model\.safetensors lacks {DOWN}"),
    "unexpected": (
        False,
        lambda tensors: {**tensors, "model.layers.0.mlp.experts.0.w": torch.ones(1)},
        r"model\.safetensors holds model\.layers\.0\.mlp\.experts\.0\.w",
    ),
    "shape": (False, changed(DOWN, lambda t: t.T), rf"model\.safetensors: {DOWN} has shape \(128, 64\)"),
    "vocabulary": (False, changed(EMBEDDING, lambda t: t[:-1]), r"embed_tokens\.weight has shape \(511, 64\)"),
    "quantised": (False, changed(DOWN, lambda t: t.to(torch.int8)), rf"{DOWN} is torch\.int8"),
    "untied without head": (False, without(HEAD), r"lacks lm_head\.weight.*tie_word_embeddings"),
    "tied with another head": (True, lambda t: {**t, HEAD: t[EMBEDDING] + 1}, r"lm_head\.weight differs"),
    "tied with a smaller head": (True, lambda t: {**t, HEAD: t[EMBEDDING][1:].clone()}, r"lm_head\.weight differs"),
}


def write_faulty(folder: Path, tied: bool, fault: Callable[[Tensors], Tensors]) -> Path:
    """A tiny model whose safetensors file has been changed."""
    write_tiny_model(folder, "qwen3", TinyShape(tied_embeddings=tied))
    path = folder / "model.safetensors"
    save_file(fault(load_file(path)), path)
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_contradictory_weights_are_refused(tmp_path: Path, name: str) -> None:
    tied, fault, message = FAULTS[name]
    folder = write_faulty(tmp_path / "model", tied, fault)
    with pytest.raises(UserError, match=message):
        hf_to_megatron(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_harmless_extras_are_accepted(tmp_path: Path) -> None:
    def fault(tensors: Tensors) -> Tensors:
        buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        return {**tensors, HEAD: tensors[EMBEDDING].clone(), **buffer}

    folder = write_faulty(tmp_path / "model", True, fault)
    assert EMBEDDING in open_weights(read_architecture(folder), folder).specs


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 4}, "num_key_value_heads 2 does not divide over tensor parallelism 4"),
        ({"pipeline": 3}, "num_hidden_layers 4 does not divide over pipeline parallelism 3"),
    ],
)
def test_layout_that_does_not_divide_is_refused(tmp_path: Path, layout: dict[str, int], message: str) -> None:
    folder = write_tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        hf_to_megatron(folder, tmp_path / "out", **layout)


def test_truncated_weights_leave_the_old_output_alone(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(UserError, match=r"model\.safetensors is .* truncated or damaged"):
        hf_to_megatron(folder, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_config_without_weights_for_it_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(UserError, match=r"lacks model\.layers\.4\."):
        hf_to_megatron(folder, tmp_path / "out")
