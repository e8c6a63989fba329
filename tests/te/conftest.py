"""Pools of ranks that have a version of transformer-engine emulated."""

import pytest
import te_packages
from pool import Pool


@pytest.fixture(scope="session")
def te_pools():
    """`te_pools(version)`: ranks as the fixture `ranks` gives them, with this version's layers."""
    pools = {}

    def pool(version):
        if reason := te_packages.why_absent(version):
            pytest.skip(reason)
        if version not in pools:
            pools[version] = Pool(first="te_process", KLEAR_TE=str(te_packages.PACKAGES / version))
        return pools[version]

    yield pool
    for one in pools.values():
        one.close()


@pytest.fixture
def te_ranks(te_pools):
    """Ranks of the newest version."""
    return te_pools(te_packages.NEWEST)
