"""Faults of the kernel whose ranks wait for each other, in the form of planted_faults.py."""

from __future__ import annotations

from emulator.planted_faults import Fault

SHARDED = "cuda_sharded.cu"
_STORE = '«asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");»'
_LOAD = '«asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");»'
_POST = "«if (posts && peer < a.ranks) post(post_of(a, peer, row, a.rank), own, a.generation);»"
_AWAITED = "await_post(post_of(a, a.rank, row, «peer»), a.generation, a.timeout_ns)"
_UNTIL = "while («load_acquire(&from->generation) != generation»)"
_TICKET = "taken = «atomicInc(a.ticket, static_cast<uint32_t>(a.row.logits.rows - 1))»;"
_WRITTEN = (
    "to->stats = make_uint4(__float_as_uint(own.max), __float_as_uint(own.sum), __float_as_uint(own.spread),\n"
    "                           __float_as_uint(own.target));"
)
_NUMBERED = "store_release(&to->generation, generation);"


def _store(instruction: str) -> str:
    return f'asm volatile("{instruction} [%0], %1;" ::"l"(to), "r"(value) : "memory");'


def _load(instruction: str) -> str:
    return f'asm volatile("{instruction} %0, [%1];" : "=r"(value) : "l"(from) : "memory");'


FAULTS = (
    Fault("the number is stored without a release", "race", SHARDED, _STORE, _store("st.relaxed.sys.global.u32")),
    Fault("released to its own device only", "race", SHARDED, _STORE, _store("st.release.gpu.global.u32")),
    Fault("the number is stored like any word", "race", SHARDED, _STORE, "*to = value;"),
    Fault("the number is loaded without an acquire", "race", SHARDED, _LOAD, _load("ld.relaxed.sys.global.u32")),
    Fault("acquired from its own device only", "race", SHARDED, _LOAD, _load("ld.acquire.gpu.global.u32")),
    Fault(
        "the number before the statistics",
        "race",
        SHARDED,
        f"«{_WRITTEN}\n    {_NUMBERED}»",
        f"{_NUMBERED} {_WRITTEN}",
    ),
    Fault(
        "waits for the number before",
        "race|values",
        SHARDED,
        _UNTIL,
        "load_acquire(&from->generation) < generation - 1",
    ),
    Fault("any number will do", "race|values", SHARDED, _UNTIL, "load_acquire(&from->generation) == 0"),
    Fault("the number is not looked at", "race|values", SHARDED, _UNTIL, "false"),
    Fault(
        "waits before it posts",
        "error 719",
        SHARDED,
        _POST,
        "if (peer < a.ranks) await_post(post_of(a, a.rank, row, peer), a.generation, a.timeout_ns); "
        "if (posts && peer < a.ranks) post(post_of(a, peer, row, a.rank), own, a.generation);",
    ),
    Fault(
        "one peer gets no post",
        "error 719",
        SHARDED,
        _POST,
        "if (posts && peer + 1 < a.ranks) post(post_of(a, peer, row, a.rank), own, a.generation);",
    ),
    Fault("ranks are merged from the last to the first", "values", SHARDED, _AWAITED, "a.ranks - 1 - peer"),
    Fault("each rank begins with itself", "values", SHARDED, _AWAITED, "(peer + a.rank) % a.ranks"),
    Fault(
        "each rank looks into its neighbour's mailbox",
        "out of bounds",
        SHARDED,
        "a.mailboxes[«mailbox»]",
        "(mailbox + 1) % a.ranks",
    ),
    Fault("launches share one half of the mailbox", "race", SHARDED, "(«(a.generation & 1)» * a.capacity", "0"),
    Fault("entries of a row lie over the next one's", "race|values|error 719", SHARDED, "+ row) * «a.ranks»", "2"),
    Fault(
        "a first row without weight is not awaited",
        "race|values",
        SHARDED,
        "if («row == 0 && block == 0 && threadIdx.x < 32»)",
        "false",
    ),
    Fault("rows go by the number of the block", "error 719", SHARDED, _TICKET, "blockIdx.x / kCluster"),
    Fault("the counter of rows does not come back to 0", "out of bounds", SHARDED, _TICKET, "atomicInc(a.ticket, ~0u)"),
    Fault("every block of a cluster posts", "race", SHARDED, "exchange(a, row, «block == 0», own, all)", "true"),
    Fault(
        "no barrier before its own statistics are posted",
        "race|uninitialised read",
        SHARDED,
        "«__syncwarp();»\n        exchange(",
        "",
    ),
    Fault(
        "no barrier after the others' statistics",
        "race|uninitialised read",
        SHARDED,
        "    }\n    «__syncwarp();»\n}\n#endif",
        "",
    ),
    Fault(
        "the first block ends before its peers have read the row",
        "lifetime",
        SHARDED,
        "            __syncwarp();\n            «cluster_arrive();\n            cluster_wait();»",
        "",
    ),
    Fault(
        "a wait without a bound",
        "deadlock",
        SHARDED,
        '«if (nanoseconds() - start > timeout_ns) asm volatile("trap;");»',
        "",
    ),
)
