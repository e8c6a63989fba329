"""Where transformer-engine's packages are, and the pools of ranks that have one of them emulated.

`bash tests/te/fetch_packages.sh` leaves the wheels unpacked, a folder a version, under KLEAR_TE_PACKAGES or else beside
the other things that continuous integration keeps. Without them these tests skip by name.
"""

from __future__ import annotations

import os
from pathlib import Path

OLDEST, NEWEST = "2.4.0", "2.20.2"
"""What `megatron-klear[te]` allows at the least, and the newest that these tests have run with."""
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
PACKAGES = Path(os.environ.get("KLEAR_TE_PACKAGES") or _CACHE / "megatron_klear" / "te")
EVERYWHERE = os.environ.get("KLEAR_TE_LAYOUTS") == "1"


def why_absent(version: str) -> str:
    """Why a version cannot be run here, empty where it can."""
    if (PACKAGES / version / "transformer_engine").is_dir():
        return ""
    return f"no transformer-engine {version} in {PACKAGES}; bash tests/te/fetch_packages.sh fetches it"


def versions() -> list[str]:
    """The versions to test: the two ends, or with KLEAR_TE_LAYOUTS=1 all that were fetched between them."""
    found = [path.name for path in PACKAGES.iterdir()] if EVERYWHERE and PACKAGES.is_dir() else []
    return sorted({OLDEST, NEWEST, *found}, key=lambda version: [int(part) for part in version.split(".")])
