"""Checkpoints of adapters: theirs alone, in any layout, on their base and no other, and PEFT's files both ways."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import load_and_save_again, save_after_training
from test_lora import settings
from tiny_run import SHAPE

from megatron_klear.cli import convert_mcore_to_hf, inspect_checkpoint
from megatron_klear.config.base import LoraConfig, SFTConfig
from megatron_klear.config.checks_lora import adapter_problems
from megatron_klear.data.pack import pack
from megatron_klear.data.tiny import write_tiny_model
from megatron_klear.mcore.checkpoints.adapters import Base
from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.mcore.checkpoints.convert import megatron_to_hf, transformers_logits
from megatron_klear.mcore.checkpoints.manifest import CheckpointError
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.models.peft import CONFIG_FILE, WEIGHTS_FILE, AdapterError, read_adapter_form
from megatron_klear.verify.layouts import ONE_PROCESS, layouts_named, ragged_samples

READ_IN = ["one process", "PP2", "TP2 PP2 SP", "PP2 VPP2 DP2 overlap", "CP2"]
OFTEN = READ_IN[:2]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SFTConfig:
    folder = tmp_path_factory.mktemp("adapters")
    write_tiny_model(folder / "model", "qwen3", SHAPE, weights=True)
    return settings(folder, weights="pretrained", targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module")
def written(config, ranks, tmp_path_factory) -> tuple[Path, float]:
    """A checkpoint of two steps, and the loss of the third."""
    folder = tmp_path_factory.mktemp("written")
    layout = layouts_named(["TP2 SP"])[0]
    ranks(2, save_after_training, config, layout, folder / "step-00000002", 2)
    loss = ranks(2, load_and_save_again, config, layout, folder / "step-00000002", folder / "again")[0]
    assert compare_checkpoints(folder / "step-00000002", folder / "again").bitwise_equal
    return folder / "step-00000002", loss


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in READ_IN]
)
def test_adapters_and_their_optimizer_survive_a_change_of_layout_exactly(config, written, ranks, tmp_path, name: str):
    path, expected_loss = written
    layout = layouts_named([name])[0]
    loss = ranks(layout.processes, load_and_save_again, config, layout, path, tmp_path / "again")[0]
    found = compare_checkpoints(path, tmp_path / "again")
    assert found.unequal_tensors == []
    assert found.num_tensors - found.num_optimizer_tensors == 2 * 5
    assert found.num_optimizer_tensors == 3 * 2 * 5
    assert [place for place in found.unequal_state if "rng" not in place] == []
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_a_checkpoint_is_of_adapters_alone_and_names_its_base(config, written, capsys):
    base = Base.read(written[0])
    assert base.model == str(config.model.path)
    assert (base.rank, base.alpha) == (4, 8)
    assert inspect_checkpoint.main([str(written[0]), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(".lora." in row["name"] for row in report["tensors"])
    assert report["base"]["sha256"] == base.sha256


def load_each(changed: list[SFTConfig], path: Path) -> list[str]:
    """What each of the runs says of the checkpoint."""
    told = []
    for config in changed:
        with world(config.parallel, config.seed) as topology:
            engine = Engine(config, topology)
            with pytest.raises(CheckpointError) as caught:
                engine.load(path)
            told.append(str(caught.value))
            engine.close()
    return told


def test_what_it_does_not_belong_to_is_refused(config, written, ranks, tmp_path):
    shutil.copytree(config.model.path, tmp_path / "other")
    write_tiny_model(tmp_path / "fresh", "qwen3", SHAPE, weights=False)
    other = config.model.model_copy(update={"weights": "random", "path": tmp_path / "fresh"})
    changed = [
        config.model_copy(update={"model": other}),
        config.model_copy(update={"lora": None}),
        config.model_copy(update={"lora": config.lora.model_copy(update={"alpha": 4.0})}),
    ]
    told = ranks(1, load_each, changed, written[0])[0]
    assert "are not those of" in told[0]
    assert str(tmp_path / "fresh") in told[0]
    assert "[lora]" in told[1]
    assert "lora.alpha 8.0 and not 4.0" in told[2]
    same = config.model.model_copy(update={"path": tmp_path / "other"})
    assert ranks(1, step_of, config.model_copy(update={"model": same}), written[0]) == [2]


def step_of(config: SFTConfig, path: Path) -> int:
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        engine.load(path)
        engine.close()
        return engine.step


def row():
    return pack(ragged_samples(SHAPE.vocab_size, longest=32, count=6), [1.0] * 6)


def logprobs_of(config: SFTConfig, path: Path | None, layout=ONE_PROCESS) -> torch.Tensor:
    """Of the row, by adapters of a checkpoint, or by those that the settings start from."""
    config = layout.lay_out(config)
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        if path is not None:
            engine.load(path)
        found = engine.logprobs([row()])[0]
        engine.close()
        return found


def transformers_logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, row().targets[:, None])[:, 0]


def largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs)[row().weights != 0].abs().max())


def merge(source: Path, out: Path, base: Path) -> None:
    megatron_to_hf(source, out, base=base)


def merge_tool(*words: str) -> int:
    return convert_mcore_to_hf.main([*words])


def test_the_tool_writes_a_merged_model_and_an_adapter_that_goes_on(config, written, ranks, tmp_path):
    source, merged, adapter = str(written[0]), tmp_path / "merged", tmp_path / "adapter"
    words = ("--mcore", source, "--out", str(merged), "--base", str(config.model.path))
    assert ranks(1, merge_tool, *words) == [0]
    assert convert_mcore_to_hf.main(["--mcore", source, "--out", str(adapter)]) == 0
    trained = ranks(1, logprobs_of, config, written[0])[0]
    assert largest(trained, transformers_logprobs(transformers_logits(config.model.path, row()))) > 0.01
    assert largest(trained, transformers_logprobs(transformers_logits(merged, row()))) < 1e-5
    form = read_adapter_form(adapter)
    assert (form.rank, form.alpha, set(form.targets)) == (4, 8.0, set(config.lora.targets))
    again = config.model_copy(update={"lora": config.lora.model_copy(update={"adapter": adapter})})
    assert adapter_problems(again) == []
    found = ranks(2, logprobs_of, again, None, layouts_named(["TP2 SP"])[0])[0]
    assert largest(trained, found) < 1e-5


def test_the_tool_refuses_another_base(config, written, tmp_path, ranks):
    write_tiny_model(tmp_path / "other", "qwen3", SHAPE, weights=True)
    path = tmp_path / "other" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="are not those of"):
        ranks(1, merge, written[0], tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_such_adapter_are_named(config, tmp_path, ranks):
    def told(**changes) -> list[str]:
        plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(config.lora.targets)}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(plain | changes))
        lora = config.lora.model_copy(update={"adapter": tmp_path})
        return adapter_problems(config.model_copy(update={"lora": lora}))

    assert (
        "adapter_config.json does not exist"
        in adapter_problems(config.model_copy(update={"lora": LoraConfig(adapter=tmp_path)}))[0]
    )
    assert told() == []
    assert "has rank 8, and lora.rank is 4" in told(r=8)[0]
    assert "adapts q_proj, and lora.targets" in told(target_modules=["q_proj"])[0]
    for key, value in (("use_dora", True), ("peft_type", "IA3"), ("bias", "all"), ("init_lora_weights", "pissa")):
        assert key in told(**{key: value})[0]
    told()
    lora = config.lora.model_copy(update={"adapter": tmp_path})
    with pytest.raises(AdapterError, match=WEIGHTS_FILE):
        ranks(1, logprobs_of, config.model_copy(update={"lora": lora}), None)


@pytest.fixture
def peft():
    """The library, in an environment that has it."""
    return pytest.importorskip("peft")


def test_peft_loads_ours_and_we_load_pefts(config, written, ranks, tmp_path, peft):
    from transformers import AutoModelForCausalLM

    def model():
        return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()

    def logprobs(of) -> torch.Tensor:
        bounds = row().cu_seqlens.tolist()
        with torch.no_grad():
            parts = [of(row().tokens[None, a:b]).logits[0] for a, b in pairwise(bounds)]
        return transformers_logprobs(torch.cat(parts))

    assert convert_mcore_to_hf.main(["--mcore", str(written[0]), "--out", str(tmp_path / "ours")]) == 0
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "ours")
    assert largest(ranks(1, logprobs_of, config, written[0])[0], logprobs(theirs)) < 1e-5
    form = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(config.lora.targets), init_lora_weights=False)
    torch.manual_seed(5)
    made = peft.get_peft_model(model(), form).eval()
    made.save_pretrained(tmp_path / "theirs")
    start = config.model_copy(update={"lora": config.lora.model_copy(update={"adapter": tmp_path / "theirs"})})
    assert adapter_problems(start) == []
    assert largest(ranks(2, logprobs_of, start, None, layouts_named(["TP2 SP"])[0])[0], logprobs(made)) < 1e-5
