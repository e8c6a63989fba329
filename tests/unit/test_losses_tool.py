"""The tool that prints gradient weights: tables by name and by path, a PNG, and errors that name the argument."""

import pytest
import torch

from megatron_klear.cli import losses as tool


def test_prints_the_published_weights(capsys, tmp_path):
    picture = tmp_path / "weights.png"
    assert tool.main(["gppo:dual_clip=10", "ppo:clip_high=0.28", "--plot", str(picture)]) == 0
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    cells = {ratio: [cell.strip() for cell in row.strip("│").split("│")][1:] for ratio, row in rows.items()}
    assert cells["0.3"] == ["0.3", "0.8", "0.3", "0"]
    assert cells["1.29"] == ["1.28", "1.29", "0", "1.29"]
    assert cells["10.1"] == ["1.28", "0", "0", "10.1"]
    assert picture.read_bytes().startswith(b"\x89PNG")


class Halved:
    def __init__(self, scale=0.5):
        self.scale = scale

    def __call__(self, logprobs, old_logprobs, advantages):
        return -self.scale * advantages * logprobs


@pytest.mark.parametrize(("suffix", "weight"), [("", 0.5), (":scale=2", 2.0)])
def test_reads_a_loss_by_dotted_path(suffix, weight):
    loss = tool.parse(f"{__name__}:Halved{suffix}")
    assert tool.gradient_weights(loss, torch.ones(3), -1.0).tolist() == [weight] * 3


@pytest.mark.parametrize("argument", ["gpo", "gppo:clip_low", "gppo:clip_low=x", "gppo:cliplow=1", "gppo:clip_low=2"])
def test_names_what_it_cannot_read(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main([argument])
    assert stopped.value.code == 2
    assert argument in capsys.readouterr().err


def test_losses_of_responses_and_updates_are_shown_for_a_token_alone():
    ratios = torch.tensor([0.5, 1.0, 1.4, 3.0], dtype=torch.float64)
    expected = {
        "gspo:clip_low=0.2,clip_high=0.2": [0.5, 1.0, 0.0, 0.0],
        "gmpo:clip_low=0.4,clip_high=0.4": [0.5, 1.0, 1.4, 0.0],
        "clip_cov": [0.5, 1.0, 0.0, 0.0],
        "kl_cov:kl_coefficient=0.25": [0.75, 1.0, 1.15, 2.75],
    }
    for name, weights in expected.items():
        found = tool.gradient_weights(tool.parse(name), ratios, 1.0)
        torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64), msg=name)


def test_all_losses_are_shown_without_arguments():
    shown = {text.partition(":")[0] for text in tool.DEFAULT}
    assert shown == set(tool.LOSSES) - {"nll"}, "NLL has no advantage to be multiplied"
