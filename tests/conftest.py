"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of larger real data, which a plain clone does not have."""
    folder = Path(os.environ.get("KLEAR_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"shared data is absent: no {folder} (set KLEAR_SHARED to the folder that holds data/)")
    return folder
