"""The token stores of a run: data files are hashed once a job, and tokenized once a job or once a node."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_klear.data.store import Split, StoreSettings, TokenStore, is_made, make_store, open_made
from megatron_klear.distributed.exchange import from_first_rank, patiently, same_outcome


def open_for_all(config: StoreSettings, tokenizer_folder: Path, split: Split = "train") -> TokenStore:
    """`open_store` on every rank of a job; rank 0 alone hashes the data files and tokenizes. Collective.

    Where `data.cache` lies on disks of the nodes' own, the first rank of each other node tokenizes there. No lock of
    the file system is needed for that; the store's own lock is for several jobs that share a cache.
    """
    made: list[str] = []

    def make() -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            made.append(make_store(config, tokenizer_folder, split))

    patiently(make)
    key = from_first_rank(lambda: made[0])

    def make_here() -> None:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0 and not is_made(config, key):
            make_store(config, tokenizer_folder, split)

    patiently(make_here)
    return same_outcome(lambda: open_made(config, key, split))
