"""The experts that a vLLM server sent a token through, as it tells them. Imports no torch.

With --enable-return-routed-experts an answer of `/inference/v1/generate` has them (vLLM 0.32, its second model runner,
which needs Triton and so a GPU). A server on the CPU has its worker keep them (`weights/route_keeper.py`), which is
asked for them behind the answer.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_klear.models.architecture import Architecture
from megatron_klear.rollout.vllm.answers import Malformed
from megatron_klear.types import Routes, route_type


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteForm:
    """What a server's routes must look like, and how they are had."""

    layers: int
    experts: int
    chosen: int
    kept_by_worker: bool = False
    """Whether they are to be asked of the server's worker, behind the answer."""

    @classmethod
    def of(cls, architecture: Architecture, *, kept_by_worker: bool) -> RouteForm:
        """That of a model with experts in every layer."""
        experts = architecture.experts
        assert experts is not None
        return cls(
            layers=architecture.num_layers,
            experts=experts.count,
            chosen=experts.chosen,
            kept_by_worker=kept_by_worker,
        )


def read_routes(text: Any, form: RouteForm, tokens: int) -> Routes:
    """Routes [tokens, layers, chosen] from an array in the npy form, in base64. Raises Malformed.

    Of `tokens` tokens in a row: all that the server read and was not asked to leave out, which is each but the last.
    """
    if not isinstance(text, str):
        raise Malformed(
            "no routed_experts in the answer, which algorithm.router_replay = sampler needs: start servers with "
            "--enable-return-routed-experts, or have tools/serve_rollouts.py do it"
        )
    try:
        array = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        raise Malformed(f"routed_experts are no array: {error}") from None
    wanted = (tokens, form.layers, form.chosen)
    if array.shape != wanted or array.dtype.kind not in "ui":
        raise Malformed(f"routed_experts are {array.dtype} {array.shape}, not whole numbers {wanted}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < form.experts:
        raise Malformed(f"routed_experts name experts {array.min()} to {array.max()} of {form.experts}")
    # Rows that were never filled in are all zero.
    if (array[..., 1:] == array[..., :-1]).any():
        raise Malformed("routed_experts send a token to one expert twice")
    routes: Routes = array.astype(route_type(form.experts))
    return routes


def written(routes: npt.NDArray[np.integer]) -> str:
    """What `read_routes` reads, as vLLM writes it."""
    file = io.BytesIO()
    np.save(file, routes, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")
