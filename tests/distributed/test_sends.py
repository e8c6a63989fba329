"""What a stage sends stays as it is until the send is over: a slow network must not change a number."""

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_klear.config.base import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, SFTConfig
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.verify.layouts import Layout, measure, ragged_samples

LAYOUTS = [
    Layout(name="PP2", pipeline=2),
    Layout(name="PP2 VPP2", pipeline=2, virtual_pipeline=2),
]


class Watched:
    """A send whose tensor must be the same when it was waited for as when it was asked for."""

    isend = staticmethod(distributed_c10d.isend)
    waited = 0

    def __init__(self, tensor, *arguments, **named):
        self.tensor, self.before = tensor, (tensor.data_ptr(), tensor.shape)
        self.work = self.isend(tensor, *arguments, **named)

    def wait(self):
        self.work.wait()
        Watched.waited += 1
        assert (self.tensor.data_ptr(), self.tensor.shape) == self.before, "freed before it was sent"


def measure_watched(*arguments):
    """Whether any sends were waited for; raises where one was of what had been freed."""

    def isend(tensor, *given, **named):
        return Watched(tensor, *given, **named)

    dist.isend = distributed_c10d.isend = isend
    measure(*arguments)
    return Watched.waited


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_nothing_is_freed_before_it_was_sent(tmp_path, ranks, layout):
    shape = TinyShape(tied_embeddings=True)
    write_tiny_model(tmp_path / "model", "qwen3", shape, weights=False)
    config = SFTConfig(
        output=tmp_path / "run",
        model=ModelConfig(path=tmp_path / "model", weights="random", dtype="fp32"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        data=DataConfig(train=("unused",), max_length=64, tokens_per_microbatch=128),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    samples = ragged_samples(shape.vocab_size, longest=64)
    assert min(ranks(layout.processes, measure_watched, config, layout, samples, 1, "nll")) > 10
