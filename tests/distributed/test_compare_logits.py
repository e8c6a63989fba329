"""Before a pretrained model is trained, its log-probs are compared with those of transformers on the same folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config.base import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.errors import UserError
from megatron_klear.mcore import compare_logits
from megatron_klear.mcore.compare_logits import compare_with_transformers
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import read_architecture

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough for positions to matter, as in a trained model."""
    shape = TinyShape(max_positions=128, initializer_range=0.2)
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "hf", "qwen3", shape)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": YARN}))
    return folder


def compare(
    folder: Path,
    parallel: dict[str, Any],
    settings: dict[str, Any],
    misread: dict[str, Any],
    largest: int | None = None,
) -> str:
    """On every rank: the line for the log, or the error; `misread` changes what the trainer reads of config.json."""
    run = RunConfig(
        output=folder / "run",
        model=ModelConfig.model_validate({"path": folder, "dtype": "fp32"} | settings),
        parallel=ParallelConfig(device="cpu", **parallel),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    right = read_architecture(folder)
    compare_logits.MAX_PARAMETERS = largest or 2_000_000_000
    with world(run.parallel) as topology:
        engine = Engine(run, topology, architecture=replace(right, **misread))
        try:
            return compare_with_transformers(engine)
        except UserError as error:
            return f"refused: {error}"


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "pipeline": 2}, {"context": 2}], ids=str)
def test_what_is_read_rightly_agrees_on_every_rank(ranks, model: Path, parallel: dict[str, int]):
    size = ParallelConfig(**parallel).model_size
    for told in ranks(size, compare, model, parallel, {}, {}):
        assert told.startswith("log-probs are transformers' within")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_reading_is_refused_on_every_rank(ranks, model: Path, dtype: str):
    """The norm's epsilon, which no other check looks at."""
    assert "within" in ranks(1, compare, model, {}, {"dtype": dtype}, {})[0]
    for told in ranks(2, compare, model, {"tensor": 2}, {"dtype": dtype}, {"norm_eps": 1.0}):
        assert told.startswith("refused: model.path")
        assert "log-probs differ from transformers'" in told


def test_a_wrong_rotary_embedding_is_refused_before_that(ranks, model: Path):
    plain = replace(read_architecture(model).rope, kind="default", parameters=())
    with pytest.raises(Exception, match="the rotary embedding is read as"):
        ranks(1, compare, model, {}, {}, {"rope": plain})


def test_it_is_switched_off_and_too_large_a_model_is_told(ranks, model: Path):
    wrong = {"norm_eps": 1.0}
    assert ranks(1, compare, model, {}, {"compare_logits": "off"}, wrong) == [""]
    assert ranks(1, compare, model, {}, {"weights": "random"}, wrong) == [""]
    (told,) = ranks(1, compare, model, {}, {}, wrong, 1000)
    assert "parameters are above 1,000" in told
    assert ranks(1, compare, model, {}, {"compare_logits": "on"}, wrong, 1000)[0].startswith("refused")
