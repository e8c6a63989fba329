"""Checkpoints in Megatron's torch_dist format: resharded on load, published whole or not at all, checked by hash.

    step-00000010/
        *.distcp .metadata ...    Megatron's files: weights, optimizer state, RNG state
        training.json             step, the caller's `extra`, layout and versions; of adapters, their base
        rollouts.npz ...          the caller's files, such as groups drawn and not trained on yet
        hf/                       the model's config.json and tokenizer files
        manifest.json             size and SHA-256 of every file above

Where adapters are trained the weights and the optimizer state are theirs alone, and `base` names the model under them.

A save writes into a hidden sibling folder and renames it once the manifest is on disk: a kill at any instant leaves the
previous checkpoint as it was. `manifest.py` holds what needs no Megatron: discovery, verification, retention.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_klear.distributed import exchange
from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore.checkpoints import background, manifest
from megatron_klear.mcore.checkpoints.adapters import BASE, Base, check_base
from megatron_klear.mcore.checkpoints.manifest import CheckpointError
from megatron_klear.mcore.lora import is_adapter
from megatron_klear.mcore.model import PolicyModel
from megatron_klear.mcore.optimizer import load_state
from megatron_klear.mcore.topology import Topology
from megatron_klear.models.stop_tokens import Turns

device_shim.install()

import megatron.core  # noqa: E402  (the shim must come first)
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.serialization import (  # noqa: E402
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # noqa: E402
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

_ERRORS = (Exception, CheckpointException)  # torch derives its own from BaseException


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """What a checkpoint holds. Without an optimizer it is weights alone."""

    models: list[PolicyModel]
    optimizer: Any | None
    step: int
    extra: dict[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The caller's, by name, to lie beside Megatron's."""
    turns: Turns = field(default_factory=Turns)
    """What the model files kept with it are to say of chats."""
    base: Base | None = None
    """Of adapters, which are then all that is held of the models."""

    def holds(self, name: str) -> bool:
        """Whether a parameter is part of it: an adapter, or in a whole model everything else.

        What transformer-engine's layers keep beside parameters (amax histories of delayed scaling, which no run uses)
        is of no model: checkpoints are the same with its layers and without.
        """
        return is_adapter(name) == (self.base is not None) and not _EXTRA_STATE.search(name)


_EXTRA_STATE = re.compile(r"\._extra_state\d*(/|$)")


@dataclass(frozen=True, slots=True)
class _Pending:
    """A save that has no name yet."""

    hidden: Path
    path: Path
    """Where it will appear."""
    topology: Topology
    ready: Callable[[], None]


class Saver:
    """Writes checkpoints, one at a time, in the background if asked to. Collective."""

    def __init__(self, *, asynchronous: bool) -> None:
        """To be made before the model is, see `background.fork_result_queue`."""
        background.fork_result_queue()
        self._asynchronous = asynchronous
        self._queue: Any = AsyncCallsQueue(persistent=False) if asynchronous else None
        self._pending: _Pending | None = None

    def save(
        self,
        path: Path,
        state: TrainingState,
        topology: Topology,
        model_folder: Path,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Write `state` at `path`; the folder appears when it is complete and `ready`, called on every rank, returns.

        Raises CheckpointError, with what exists left as it is, when writing fails. What `ready` raises goes on as it
        is, and the folder does not appear.
        """
        self.finish(blocking=True)
        hidden = _hidden_folder(path, topology)
        try:
            request = _write(hidden, state, topology, model_folder, asynchronous=self._asynchronous)
            if request is not None:
                write = background.ending_with_this(request.async_fn, hidden, topology.rank)
                self._queue.schedule_async_request(request._replace(async_fn=write))
        except _ERRORS as error:
            raise _failure(hidden, path, error) from error
        self._pending = _Pending(hidden, path, topology, ready)
        if request is None:
            self._publish(self._pending)

    def finish(self, *, blocking: bool) -> None:
        """Publish a background save that has been written, or with `blocking` wait for it."""
        pending = self._pending
        if pending is None:
            return
        try:
            written = self._queue.maybe_finalize_async_calls(blocking=blocking)
        except _ERRORS as error:
            self._pending = None
            raise _failure(pending.hidden, pending.path, error) from error
        if written:
            self._publish(pending)

    def _publish(self, pending: _Pending) -> None:
        self._pending = None
        try:
            pending.ready()
        except BaseException:
            shutil.rmtree(pending.hidden, ignore_errors=True)
            raise
        try:
            _publish(pending.hidden, pending.path, pending.topology)
        except _ERRORS as error:
            raise _failure(pending.hidden, pending.path, error) from error

    def close(self) -> None:
        """Wait for a background save and stop its processes."""
        self.finish(blocking=True)
        if self._queue is not None:
            self._queue.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a checkpoint said beside the weights and the optimizer state, which are in place."""

    step: int
    extra: dict[str, Any]


def load(path: Path, state: TrainingState, topology: Topology) -> Loaded:
    """Read weights, optimizer and RNG state of `path` into this layout.

    Raises CheckpointError when the folder is not a checkpoint or holds another model, or adapters of another.
    """
    training = manifest.read_training(path)
    check_base(path, state.base)
    if not training["has_optimizer"]:
        raise CheckpointError(f"{path} holds weights alone; start from it with model.checkpoint instead of resuming")
    loaded = _read(path, _sharded_state(state, topology, loading=True), topology)
    _set_weights(state, loaded)
    assert state.optimizer is not None
    load_state(state.optimizer, loaded["optimizer"])
    _set_rng(loaded["rng"], topology)
    return Loaded(step=int(training["step"]), extra=training["extra"])


def load_weights(path: Path, models: list[PolicyModel], topology: Topology) -> None:
    """Read the weights alone of `path` into the chunks, before an optimizer is built over them; adapters stay."""
    check_base(path, None)
    state = TrainingState(models=models, optimizer=None, step=0, extra={})
    _set_weights(state, _read(path, _sharded_state(state, topology, loading=True), topology))


def load_adapters(path: Path, models: list[PolicyModel], base: Base, topology: Topology) -> None:
    """Read the adapters alone of `path` into the chunks. Raises CheckpointError where they are not of `base`."""
    check_base(path, base)
    state = TrainingState(models=models, optimizer=None, step=0, extra={}, base=base)
    _set_weights(state, _read(path, _sharded_state(state, topology, loading=True), topology))


def latest_valid(checkpoints: Path, topology: Topology) -> Path | None:
    """The newest checkpoint whose files are all there and have the hashes of the manifest, None where there is none.

    Ranks divide the hashing. A damaged checkpoint is passed over with a loud message.
    Raises CheckpointError where there are some and none is whole: starting anew is for a person to decide.
    """
    found = exchange.tell_all(manifest.steps(checkpoints))
    for step in reversed(found):
        path = manifest.step_folder(checkpoints, step)
        shares = exchange.gather_all(manifest.damage(path, topology.rank, topology.size))
        problems = sorted({problem for share in shares for problem in share})
        if not problems:
            return path
        if topology.rank == 0:
            manifest.warn(f"checkpoint {path} is damaged and passed over: {'; '.join(problems)}")
    if found:
        raise CheckpointError(
            f"every checkpoint in {checkpoints} is damaged; restore one, or choose another output to start anew"
        )
    return None


def save_weights(path: Path, models: list[PolicyModel], topology: Topology, model_folder: Path) -> None:
    """Write the weights alone of the chunks as a checkpoint at `path`."""
    Saver(asynchronous=False).save(
        path, TrainingState(models=models, optimizer=None, step=0, extra={}), topology, model_folder
    )


def _sharded_state(state: TrainingState, topology: Topology, *, loading: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",  # the default raises in these versions
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    single = len(state.models) == 1
    sharded: dict[str, Any] = {
        "model" if single else f"model{index}": {
            name: entry for name, entry in model.sharded_state_dict(metadata=metadata).items() if state.holds(name)
        }
        for index, model in enumerate(state.models)
    }
    if state.optimizer is not None:
        sharded["optimizer"] = state.optimizer.sharded_state_dict(dict(sharded), is_loading=loading, metadata=metadata)
        sharded["rng"] = [] if loading else _rng_states(topology)
    return sharded


def _write(hidden: Path, state: TrainingState, topology: Topology, model_folder: Path, *, asynchronous: bool) -> Any:
    """Write Megatron's files and ours; the request of the background part, None when all is written."""
    sharded = _sharded_state(state, topology, loading=False)
    strategy = get_default_save_sharded_strategy()
    if topology.data_context.size > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, topology.data_context.group)
    options: dict[str, Any] = {"async_sharded_save": asynchronous}
    if asynchronous and "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # 0.19's default needs a package of its own
    request = dist_checkpointing.save(sharded, str(hidden), strategy, **options)
    if topology.rank == 0:
        training = {
            "step": state.step,
            "extra": state.extra,
            "has_optimizer": state.optimizer is not None,
            "layout": topology.parallel.model_dump(mode="json"),
            "world_size": topology.size,
            **({} if state.base is None else {BASE: state.base.to_json()}),
            "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        }
        hidden.joinpath("training.json").write_text(json.dumps(training, indent=1))
        for name, content in state.files.items():
            hidden.joinpath(name).write_bytes(content)
        manifest.copy_model_files(model_folder, hidden / "hf", state.turns)
    return request


def _read(path: Path, sharded: dict[str, Any], topology: Topology) -> dict[str, Any]:
    strategy = get_default_load_sharded_strategy(str(path))
    if topology.data_context.size > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, topology.data_context.group)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(path), strategy)
    except _ERRORS as error:
        raise CheckpointError(
            f"{path} could not be read into this model: {_cause(error)}; it may be damaged "
            "(tools/inspect_checkpoint.py verifies it) or of another model than model.path"
        ) from error
    return loaded


def _set_weights(state: TrainingState, loaded: dict[str, Any]) -> None:
    for index, model in enumerate(state.models):
        part = loaded["model" if len(state.models) == 1 else f"model{index}"]
        others = {name: value for name, value in model.state_dict().items() if not state.holds(name)}
        model.load_state_dict(others | part, strict=True)


def _publish(hidden: Path, path: Path, topology: Topology) -> None:
    """Make the manifest of what every rank's writer has noted of its own files, and rename the folder into place."""
    shares = exchange.gather_first(manifest.written(hidden, topology.rank))
    if topology.rank == 0:
        manifest.publish(hidden, path, {name: entry for share in shares for name, entry in share.items()})
    topology.barrier()


def _hidden_folder(path: Path, topology: Topology) -> Path:
    """A new hidden folder beside `path`, the same on every rank."""
    hidden = path.parent / exchange.tell_all(f".saving-{path.name}-{os.getpid()}")
    if topology.rank == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    topology.barrier()
    return hidden


def _failure(hidden: Path, path: Path, error: BaseException) -> CheckpointError:
    shutil.rmtree(hidden, ignore_errors=True)
    free = shutil.disk_usage(path.parent).free / 2**30 if path.parent.is_dir() else 0.0
    return CheckpointError(
        f"checkpoint {path} could not be written: {_cause(error)}; earlier checkpoints are as they were. Check the "
        f"free space ({free:.1f} GiB now) and the permissions of the output folder, then start the run again: it "
        "resumes"
    )


def _cause(error: BaseException) -> str:
    """What went wrong, without the tracebacks of all ranks that torch's exception carries in its text."""
    if isinstance(error, CheckpointException):
        return "; ".join(dict.fromkeys(str(failure[0]) for failure in error.failures.values())) or "on another rank"
    return str(error)


def _rng_states(topology: Topology) -> list[dict[str, Any]]:
    from megatron.core import tensor_parallel

    own = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return exchange.gather_all(own)


def _set_rng(states: list[dict[str, Any]], topology: Topology) -> None:
    """Restore this rank's generators; in another world size they keep the run's seed."""
    from megatron.core import tensor_parallel

    if len(states) != topology.size:
        return
    own = states[topology.rank]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(own["tracker"])
