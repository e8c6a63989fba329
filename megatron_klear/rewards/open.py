"""The grading pool that the settings ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from .base import RewardSettings
from .owner import OwnedPool
from .pool import GradingPool
from .ray_node import check_ray
from .worker import Request

Backend = Literal["local", "ray"]
AnyPool = OwnedPool
"""What every pool has: submit, grade, wait_until_ready, close, failure, settings."""


def check_backend(backend: Backend) -> None:
    """Raise RewardError where this machine lacks what a backend needs; cheap, for before a run."""
    if backend == "ray":
        check_ray()


def open_pool(
    data_sources: Iterable[str],
    settings: RewardSettings,
    *,
    backend: Backend = "local",
    ray_address: str = "",
    ray_nodes: int = 1,
    timeout_seconds: float = 5.0,
    workers: int = 0,
    trials: Sequence[Request] = (),
    environment: Sequence[str] = (),
) -> AnyPool:
    """A pool of `workers` a node (0: one per core), on this machine or on those of a Ray; a context manager.

    `ray_address` and `ray_nodes` are for `ray`: which one ("" starts one), and how many nodes must have joined it.
    Raises RewardError where a data source has no reward, or Ray is not installed.
    """
    if backend == "local":
        return GradingPool(
            data_sources,
            settings,
            timeout_seconds=timeout_seconds,
            workers=workers,
            trials=trials,
            environment=environment,
        )
    from .ray_pool import RayGradingPool

    return RayGradingPool(
        data_sources,
        settings,
        address=ray_address,
        nodes=ray_nodes,
        timeout_seconds=timeout_seconds,
        workers=workers,
        trials=trials,
        environment=environment,
    )
