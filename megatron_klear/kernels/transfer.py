"""From the host to a GPU without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; on a GPU the copy goes on, in the order of the current stream, when this returns.

    It goes through pinned memory, which torch gives out again only once the copy has been made.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
