"""The end of a turn as a run sees it: which tokens end a response, what to say of them, and the folder it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_klear.data.tokenizer import ChatTokenizer
from megatron_klear.mcore.checkpoints.adapters import export_adapter
from megatron_klear.mcore.checkpoints.convert import export_hf
from megatron_klear.mcore.engine import Engine
from megatron_klear.models.stop_tokens import StopTokens, Turns, read_stop_tokens


def stop_tokens_of(model_folder: Path, tokenizer: ChatTokenizer) -> StopTokens:
    """The ends of a response of a model folder under the template of `tokenizer`."""
    return read_stop_tokens(model_folder, turn_end=tokenizer.turn_end, tokenizer_eos=tokenizer.eos)


def turns_of(stop: StopTokens, chat_template: Path | None) -> Turns:
    """What saved folders say of chats trained with these ends of a turn and, if not the model's own, this template."""
    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    return Turns(end=stop.turn_end, template=template)


def training_notes(tokenizer: ChatTokenizer, stop: StopTokens) -> Iterator[str]:
    """What supervised training says of the end that it teaches, where it is not the model's own or is not taught."""
    if stop.note:
        yield stop.note
    found = tokenizer.template.turn_end()
    if found and not found[1]:
        yield (
            f"{tokenizer.template.name} ends a turn with {found[0].strip()!r} outside its generation block, so it is "
            "not trained and the model does not learn to stop; put it inside (data.chat_template)"
        )


def export_folder(engine: Engine, out: Path) -> None:
    """Write the trained model as a Hugging Face folder that chats as it was trained. Collective.

    Adapters are merged into it, and are in `adapter` beside it as PEFT reads them.
    """
    if engine.base is not None:
        writer = engine.topology.rank == 0
        export_adapter(engine.adapter_weights(), engine.base, out.with_name("adapter"), writer=writer)
    export_hf(
        engine.hf_weights(),
        engine.architecture,
        engine.run.model.path,
        out,
        writer=engine.topology.rank == 0,
        turns=engine.turns,
    )
