"""The host never waits for the device within a step's micro-batches: every tensor that it looks at is its own.

The card is emulated by marks (tests/emulated_card.py): rows as they are laid out are the host's, what is sent and all
that is made of it lies on the card. What waits for a card is counted as the schedule runs, backward included.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_card import EmulatedCard, on_host
from test_skipped_steps import GradientIsNaN

from megatron_klear.config.base import DataConfig, ModelConfig, SFTConfig
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.kernels import ops, selection
from megatron_klear.mcore import engine as engine_module
from megatron_klear.mcore import rows as rows_module
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.head import Head
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import GPPO, NLL
from megatron_klear.verify.layouts import ONE_PROCESS, Layout, layouts_named, ragged_samples

WAITING = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "argwhere"),
    *("__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "equal", "allclose"),
}
PASSES = ("nll", "gppo", "silent", "two phases", "logprobs")
SHAPE = TinyShape(tied_embeddings=True)


class WatchedCard(EmulatedCard):
    """Counts what waits for the card."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a call that waits, then answer it."""
        name = getattr(func, "__name__", "")
        # Stages tell each other the shapes of what they send: the schedule's own waiting.
        of_schedule = sys._getframe(1).f_code.co_filename.endswith("p2p_communication.py")
        if args and isinstance(args[0], torch.Tensor) and not of_schedule:
            places = args[1] if name in ("__getitem__", "__setitem__") else None
            places = places if isinstance(places, (tuple, list)) else [places]
            masks = [p for p in places if isinstance(p, torch.Tensor) and p.dtype == torch.bool]
            if name == "__setitem__" and len(masks) == 1 and not isinstance(args[2], torch.Tensor):
                masks = []  # a number is filled in where the mask is true, which counts nothing
            indices = [p for p in places if isinstance(p, torch.Tensor) and p.dim()]
            if name in WAITING or (name == "where" and len(args) == 1) or masks:
                looked_at = masks or [args[0]]
                self.waits[name] += any(not on_host(tensor) for tensor in looked_at)
            elif not on_host(args[0]):  # an index that is the host's is copied to the card and waited for
                self.waits[name] += any(on_host(index) for index in indices)
        return super().__torch_function__(func, types, args, kwargs)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`send` to the emulated card."""
    assert on_host(tensor), "sent twice"
    return tensor.detach().to("cuda")


def marked(row: rows_module.LocalRow) -> rows_module.LocalRow:
    """A row whose tensors are the host's."""
    params, sequences = vars(row.params).values(), row.params.sequences
    assert sequences is not None
    of_sequences = (sequences.of_token, sequences.lengths, sequences.weights)
    for tensor in (row.tokens, row.source, *row.host.values(), *params, *of_sequences):
        if isinstance(tensor, torch.Tensor):
            tensor._on_host = True  # type: ignore[attr-defined]
    return row


def looking(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`Head.loss` that looks at a number first."""

    def look(head: Head, model: Any, row: Any, hidden: torch.Tensor, **options: Any) -> Any:
        assert hidden.isfinite().all()
        return loss(head, model, row, hidden, **options)

    return look


def host_rng_state() -> torch.Tensor:
    """The state of torch's generator of the host, which Megatron compares at every micro-batch."""
    state = torch.default_generator.get_state()
    state._on_host = True  # type: ignore[attr-defined]
    return state


def waits(folder: Path, layout: Layout, count: int, planted: bool = False) -> dict[str, dict[str, int]]:
    """Of each kind of pass over `count` rows, the calls that waited for the card."""
    config = SFTConfig(
        output=folder / "run",
        model=ModelConfig(path=folder / "model", weights="random", dtype="fp32"),
        data=DataConfig(train=("unused",), max_length=64, tokens_per_microbatch=128),
    )
    samples = ragged_samples(SHAPE.vocab_size, longest=64, count=2 * count)
    share = loss_weights(np.array([num_predicted(sample) for sample in samples]), "token_mean").tolist()
    packed = [pack(samples[2 * i : 2 * i + 2], share[2 * i : 2 * i + 2]) for i in range(count)]
    batches = [
        replace(
            batch,
            old_logprobs=torch.full_like(batch.weights, -6.0),
            advantages=torch.arange(len(batch.weights)).float() % 3 - 1,  # some are silent
        )
        for batch in packed
    ]
    laid_out = layout.apply(config)
    found = {}
    with world(laid_out.parallel, laid_out.seed) as topology, pytest.MonkeyPatch.context() as patch:
        engine = Engine(laid_out, topology)
        of_megatron = engine_module.get_forward_backward_func()
        card = WatchedCard()

        def schedule(**arguments: Any) -> Any:
            with card:
                return of_megatron(**arguments)

        patch.setattr(engine_module, "get_forward_backward_func", lambda: schedule)
        patch.setattr(engine_module, "local_row", lambda *args: marked(rows_module.local_row(*args)))
        patch.setattr(torch, "get_rng_state", host_rng_state)
        for module in (rows_module, selection):
            patch.setattr(module, "send", sent)
        for name in ("policy_loss", "policy_loss_into", "logprobs"):  # the mode does not see into an operator
            patch.setattr(ops, name, getattr(ops, name)._init_fn)
        if planted:
            patch.setattr(Head, "loss", looking(Head.loss))
        runs = {
            "nll": lambda: engine.train_step(batches, NLL()),
            "gppo": lambda: engine.train_step(batches, GPPO(), ratios=[], entropy_coefficient=0.01),
            "silent": lambda: engine.train_step(batches, GPPO()),
            "two phases": lambda: engine.train_step(batches, GradientIsNaN()),
            "logprobs": lambda: engine.logprobs(batches),
        }
        for name in PASSES:
            card.waits.clear()
            runs[name]()
            found[name] = {kind: number for kind, number in card.waits.items() if number}
        engine.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("syncs")
    write_tiny_model(place / "model", "qwen3", SHAPE, weights=False)
    return place


@pytest.mark.parametrize("name", ["one process", "full recompute", "TP2 SP", "CP2", "PP2 VPP2"])
def test_no_micro_batch_waits_for_the_card(folder: Path, ranks: Any, name: str) -> None:
    (layout,) = layouts_named([name])
    for of_rank in ranks(layout.processes, waits, folder, layout, 4):
        assert of_rank == {kind: {} for kind in PASSES}


def test_one_that_waits_is_noticed(folder: Path, ranks: Any) -> None:
    (found,) = ranks(1, waits, folder, ONE_PROCESS, 3, True)
    assert found.pop("logprobs") == {}  # it has no loss
    assert all(of_pass == {"__bool__": 3} for of_pass in found.values()), found
