"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import Pool

ROOT = Path(__file__).resolve().parent.parent


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
