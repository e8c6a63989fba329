"""A folder with a longer context: config.json in its own spelling, links beside it, nothing else touched."""

import json

import pytest

from megatron_klear.cli.extend import main
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.errors import UserError
from megatron_klear.models.architecture import read_architecture
from megatron_klear.models.extend import extended_config, trained_positions, write_extended

LEGACY = {"max_position_embeddings": 40960, "rope_theta": 1e6, "rope_scaling": None}
MODERN = {"max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
TABLE = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 32768}


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "model", "qwen3", TinyShape(max_positions=96), weights=False)


def test_the_config_that_the_paper_evaluates_at_64k():
    """The released script's `hf_overrides`, in either spelling."""
    legacy, modern = (extended_config(config, 2.5, None, "config.json") for config in (LEGACY, MODERN))
    assert legacy == {"max_position_embeddings": 81920, "rope_theta": 1e6, "rope_scaling": TABLE}
    assert modern == {"max_position_embeddings": 81920, "rope_parameters": {**TABLE, "rope_theta": 1e6}}
    assert [trained_positions(n) for n in (40960, 32768, 131072, 2048)] == [32768, 32768, 131072, 2048]


def test_the_folder_holds_another_config_and_links(model, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    main(["--model", str(model), "--output", str(tmp_path / "long"), "--factor", "3"])
    long = read_architecture(tmp_path / "long")
    assert (long.max_positions, long.rope.kind) == (192, "yarn")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert {path.name for path in (tmp_path / "long").iterdir()} == before.keys()
    assert all(path.is_symlink() == (path.name != "config.json") for path in (tmp_path / "long").iterdir())
    write_extended(model, tmp_path / "long", 3.0)
    with pytest.raises(UserError, match="is another folder"):
        write_extended(model, tmp_path / "long", 2.0)


@pytest.mark.parametrize(
    ("factor", "original", "message"),
    [
        (1.5, None, "gives 96, and the model has 96"),
        (2.5, 97, "the model has 96"),
        (2.5, 0, "the model has 96"),
        (float("nan"), None, "factor nan is no number"),
        (float("inf"), None, "factor inf is no number"),
    ],
)
def test_what_would_not_extend_is_refused(model, tmp_path, factor, original, message):
    with pytest.raises(UserError, match=message):
        write_extended(model, tmp_path / "long", factor, original)
    assert not (tmp_path / "long").exists()


def test_a_scaled_model_is_refused(model, tmp_path):
    write_extended(model, tmp_path / "long")
    with pytest.raises(UserError, match="scaled already"):
        write_extended(tmp_path / "long", tmp_path / "longer")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        write_extended(tmp_path / "nothing", tmp_path / "longer")


def test_a_folder_of_links_is_followed_and_a_broken_one_refused(model, tmp_path):
    """As a cache of downloads has them; the extended folder may be moved."""
    (tmp_path / "blobs").mkdir()
    (model / "tokenizer.json").rename(tmp_path / "blobs" / "1f")
    (model / "tokenizer.json").symlink_to("../blobs/1f")
    (tmp_path / "elsewhere").mkdir()
    moved = write_extended(model, tmp_path / "long").rename(tmp_path / "elsewhere" / "long")
    assert (moved / "tokenizer.json").read_bytes() == (tmp_path / "blobs" / "1f").read_bytes()
    (model / "model.safetensors").symlink_to("../blobs/2e")
    with pytest.raises(UserError, match=r"model.safetensors is a link to \.\./blobs/2e, which is not there"):
        write_extended(model, tmp_path / "longer")
    assert not (tmp_path / "longer").exists()


def test_an_original_length_without_scaling_gives_way(model, tmp_path):
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"original_max_position_embeddings": 40}))
    assert dict(read_architecture(write_extended(model, tmp_path / "long")).rope.parameters)[
        "original_max_position_embeddings"
    ] == trained_positions(96)


def test_folders_are_linked_too_but_for_hidden_ones_and_the_output(model, tmp_path):
    for name in ("additional_chat_templates", ".cache", "longer"):
        (model / name).mkdir()
        (model / name / "tool_use.jinja").write_text("{{ messages }}")
    for _ in range(2):  # the second finds its own
        long = write_extended(model, model / "longer" / "by-2.5")
    assert (long / "additional_chat_templates/tool_use.jinja").read_text() == "{{ messages }}"
    assert not (long / ".cache").exists()
    assert not (long / "longer").exists()
    (model / "evaluation").mkdir()
    assert write_extended(model, long) == long
    (model / "chat_template.json").write_text("{}")
    with pytest.raises(UserError, match="is another folder"):
        write_extended(model, long)


def test_a_file_is_neither_a_model_nor_a_place_for_one(model, tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        write_extended(model / "config.json", tmp_path / "long")
    with pytest.raises(UserError, match="would lie in a file"):
        write_extended(model, model / "config.json" / "long")
