"""Fixtures shared by all tests."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import Pool

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by name what this machine lacks, and leave the slow tests for the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    absent = {}
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            absent["gpu"] = "no CUDA device"
    if importlib.util.find_spec("vllm") is None:
        absent["vllm"] = "no vLLM in this environment"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of larger real data, which a plain clone does not have."""
    folder = Path(os.environ.get("KLEAR_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"shared data is absent: no {folder} (set KLEAR_SHARED to the folder that holds data/)")
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Run `function(*args)` on several gloo ranks: `ranks(world_size, function, *args)` -> results by rank."""
    pool = Pool()
    yield pool
    pool.close()
