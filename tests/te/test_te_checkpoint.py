"""A model with transformer-engine's layers, through checkpoints and Hugging Face folders, bit by bit.

KLEAR_TE_LAYOUTS=1 runs both ways, both kinds of optimizers, and models with experts.
"""

import pytest
import te_packages
from safetensors.torch import load_file
from te_runs import exported, layers, load_and_save_again, save_after_steps, tiny

from megatron_klear.mcore.checkpoints import convert
from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.verify.layouts import ONE_PROCESS, layouts_named

FAMILIES = ("qwen3", "qwen3_moe") if te_packages.EVERYWHERE else ("qwen3",)
TP2 = layouts_named(["TP2 SP"])[0]


@pytest.fixture(scope="module", params=FAMILIES)
def config(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp(request.param), request.param, weights=True)


def hf_files(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def to_hf(source, out):
    return convert.megatron_to_hf(source, out)


@pytest.mark.parametrize("distributed", [True, False] if te_packages.EVERYWHERE else [True])
@pytest.mark.parametrize("first", ["on", "off"] if te_packages.EVERYWHERE else ["off"])
def test_a_checkpoint_goes_from_one_kind_of_layers_to_the_other(config, ranks, te_ranks, tmp_path, first, distributed):
    """Weights and Adam's moments, from two sequence-parallel ranks to one and back."""
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"distributed": distributed})})
    pools = {"on": te_ranks, "off": ranks}
    second = {"on": "off", "off": "on"}[first]
    expected = pools[first](2, save_after_steps, layers(config, first), TP2, tmp_path / "step-00000002", 2)
    other = pools[second](
        1, load_and_save_again, layers(config, second), ONE_PROCESS, tmp_path / "step-00000002", tmp_path / "other"
    )
    back = pools[first](2, load_and_save_again, layers(config, first), TP2, tmp_path / "other", tmp_path / "back")
    for path in ("other", "back"):
        found = compare_checkpoints(tmp_path / "step-00000002", tmp_path / path)
        assert found.unequal_tensors == []
        assert found.num_optimizer_tensors == (3 if distributed else 2) * (
            found.num_tensors - found.num_optimizer_tensors
        )
    assert other[0][0] == back[0][0] == 2
    assert other[0][1] == pytest.approx(expected[0], rel=1e-6)
    assert back[0][1] == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize(
    "layout", [ONE_PROCESS, TP2] if te_packages.EVERYWHERE else [TP2], ids=lambda layout: layout.name
)
def test_weights_of_a_folder_come_out_as_they_went_in(config, te_ranks, layout):
    whole = te_ranks(layout.processes, exported, layers(config, "on"), layout)[0]
    files = hf_files(config.model.path)
    assert whole.keys() == files.keys()
    for name, tensor in files.items():
        assert whole[name].equal(tensor), name


@pytest.mark.skipif(not te_packages.EVERYWHERE, reason="KLEAR_TE_LAYOUTS=1 runs it")
def test_the_export_of_a_te_checkpoint_is_that_of_a_local_one(config, ranks, te_ranks, tmp_path):
    te_ranks(2, save_after_steps, layers(config, "on"), TP2, tmp_path / "step-00000001", 1)
    for pool, name in ((ranks, "local"), (te_ranks, "te")):
        assert pool(1, to_hf, tmp_path / "step-00000001", tmp_path / name)
    local, te = hf_files(tmp_path / "local"), hf_files(tmp_path / "te")
    assert local.keys() == te.keys() == hf_files(config.model.path).keys()
    assert all(te[name].equal(tensor) for name, tensor in local.items())
