"""What a vLLM server's `/metrics` say of its work: tokens computed so far, and tokens that its cache holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^(vllm:\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLoad:
    """Sums over a server's engines (data parallelism)."""

    tokens: float
    """Tokens drawn and prompt tokens read since it was started: it makes progress where this number changes."""
    cache_tokens: int | None
    """Tokens that the KV cache holds; None where the server does not say."""


def read_metrics(text: str) -> ServerLoad | None:
    """The load in a page of metrics; None where the counters are not in it (a server without statistics)."""
    counted: list[float] = []
    sizes: list[int | None] = []
    for name, labels, value in _LINE.findall(text):
        if name in _COUNTERS:
            try:
                counted.append(float(value))
            except ValueError:
                return None
        elif name == "vllm:cache_config_info":
            sizes.append(_cache_tokens(dict(_LABEL.findall(labels))))
    if not counted:
        return None
    known = [size for size in sizes if size is not None]
    return ServerLoad(tokens=sum(counted), cache_tokens=sum(known) if known and len(known) == len(sizes) else None)


def _cache_tokens(labels: dict[str, str]) -> int | None:
    told = labels.get("kv_cache_size_tokens", "")
    if told.isdigit():
        return int(told)
    # Releases that do not tell: the same for models whose layers all keep the whole context.
    blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    return int(blocks) * int(size) if blocks.isdigit() and size.isdigit() else None
