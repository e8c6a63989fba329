"""The faults of planted.py: what a person writing these kernels may get wrong, and by what it must be noticed."""

from __future__ import annotations

from dataclasses import dataclass

ONE, CLUSTER, TWO, ROW, PAIRS, MATH, HOST = (
    "cuda_one_read.cu",
    "cuda_cluster.cuh",
    "cuda_two_read.cu",
    "cuda_row.cuh",
    "cuda_pairs.cuh",
    "row_math.h",
    "policy_loss_cuda.cu",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """The part of `place` between « and » becomes `new`."""

    name: str
    seen_as: str
    """Kinds of report, divided by |, one of which must be made; "values" where results are wrong and nothing else is,
    "error N" where the call returns N."""
    file: str
    place: str
    new: str


_MEET = "        __syncwarp();\n        «cluster_arrive();\n        cluster_wait();»"
_STARTED = "«if constexpr (kCluster > 1) cluster_arrive_started();»"
_INIT = '«asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");»'
_WAIT_FOR_THE_OTHER = (
    'asm volatile("{ .reg .pred done; AGAIN_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 1; '
    '@!done bra AGAIN_%=; }" ::"r"(shared_address(&barriers[piece])) : "memory");'
)
_COMBINE = "«if (row < rows) store_stats(combined, rows, row, merge_row(stats, ranks, rows, row));»"
_BACKWARDS = (
    "float back[32]; if (row >= rows) return; "
    "for (int i = 0; i < 4 * ranks; ++i) back[i] = stats[(4 * (ranks - 1 - i / 4) + i % 4) * rows + row]; "
    "store_stats(combined, rows, row, merge_row(back, ranks, 1, 0));"
)

BARRIERS = (
    Fault(
        "no barrier in block_max",
        "uninitialised read|race",
        CLUSTER,
        "«__syncthreads();»\n    value = warps[0];\n#pragma unroll\n    for (int i = 1; i < kWarps; ++i) value",
        "",
    ),
    Fault(
        "no barrier in block_sums",
        "uninitialised read|race",
        CLUSTER,
        "«__syncthreads();»\n    value = warps[0];\n#pragma unroll\n    for (int i = 1; i < kWarps; ++i) {",
        "",
    ),
    Fault(
        "no barrier before the gradient",
        "uninitialised read|race",
        ONE,
        "«__syncthreads();»\n    const RowGradient gradient",
        "",
    ),
    Fault(
        "no barrier after the copies are started",
        "mbarrier|race",
        ONE,
        "«__syncthreads();»\n    RowStats stats = cluster_stats",
        "",
    ),
    Fault(
        "no barrier before the warps' partials",
        "uninitialised read|race",
        TWO,
        "«__syncthreads();»\n    if (threadIdx.x < 32) {",
        "",
    ),
    Fault(
        "no barrier before the gradient of two reads",
        "uninitialised read|race",
        TWO,
        "«__syncthreads();»\n    const RowGradient gradient",
        "",
    ),
    Fault("narrowed in place without a barrier", "race", TWO, "if («narrowed») __syncthreads();", "false"),
    Fault(
        "skipped rows leave a block waiting",
        "divergence",
        ONE,
        "«return;»\n    }\n    const int count",
        "if (threadIdx.x < 64) return;",
    ),
)

COPIES = (
    Fault(
        "waits for three pieces of four",
        "uninitialised read|race",
        CLUSTER,
        "«barrier_wait(&barriers[piece]);»",
        "if (piece != 2) barrier_wait(&barriers[piece]);",
    ),
    Fault(
        "waits for the other parity",
        "uninitialised read|race",
        CLUSTER,
        "«barrier_wait(&barriers[piece]);»",
        _WAIT_FOR_THE_OTHER,
    ),
    Fault(
        "expects a unit too little",
        "deadlock",
        CLUSTER,
        "barrier_expect(&barriers[i], «bytes»);",
        "bytes ? bytes - 16 : 0",
    ),
    Fault("expects a unit too much", "deadlock", CLUSTER, "barrier_expect(&barriers[i], «bytes»);", "bytes + 16"),
    Fault("copies a unit too much", "out of bounds", CLUSTER, "? «units * 16u» : 0u", "units * 16u + (i == 3) * 16u"),
    Fault("copies 8 bytes too little", "alignment", CLUSTER, "? «units * 16u» : 0u", "units * 16u - 8u"),
    Fault(
        "no fence for the async proxy",
        "async proxy",
        CLUSTER,
        '«asm volatile("fence.proxy.async.shared::cta;" ::: "memory");»',
        "",
    ),
    Fault("an mbarrier of two arrivals", "deadlock", CLUSTER, _INIT, _INIT.strip("«»").replace(", 1;", ", 2;")),
    Fault(
        "too little shared memory",
        "out of bounds",
        CLUSTER,
        "dynamicSmemBytes = «static_cast<size_t>((bytes + kCluster - 1) / kCluster + 15) / 16 * 16»;",
        "static_cast<size_t>((bytes + kCluster - 1) / kCluster) / 16 * 16 - 16",
    ),
    Fault(
        "the target read after its barrier",
        "race",
        ONE,
        "INFINITY : fmaf(«target», place.scale, -stats.max)",
        "Unit<T>::load(place.logits, place.target)",
    ),
)

CLUSTERS = (
    Fault("peers written before they started", "lifetime|cluster", CLUSTER, "«cluster_wait();»  // the peers", ""),
    Fault("peers read before they wrote", "uninitialised read|race|lifetime", CLUSTER, _MEET, ""),
    Fault(
        "only one warp arrives",
        "cluster",
        CLUSTER,
        _MEET,
        "if (threadIdx.x < 32) cluster_arrive(); cluster_wait();",
    ),
    Fault(
        "a block goes on without waiting for the parts",
        "race|cluster|uninitialised read",
        CLUSTER,
        _MEET,
        "cluster_arrive(); if (rank) cluster_wait();",
    ),
    Fault(
        "the parts are published without a release",
        "race",
        CLUSTER,
        _MEET,
        "cluster_arrive_started(); cluster_wait();",
    ),
    Fault(
        "half a warp arrives",
        "divergence|cluster",
        ONE,
        _STARTED,
        "if constexpr (kCluster > 1) if (threadIdx.x != 7) cluster_arrive_started();",
    ),
    Fault(
        "a peer leaves before the cluster meets",
        "lifetime",
        ONE,
        _STARTED,
        "if (kCluster > 1 && rank == kCluster - 1) return; if constexpr (kCluster > 1) cluster_arrive_started();",
    ),
    Fault(
        "parts written to the wrong place",
        "out of bounds|race",
        CLUSTER,
        "store_to_peer(&parts[«rank * 4 + i»]",
        "rank * 4 + i + 1",
    ),
    Fault("a peer beyond the cluster", "cluster", CLUSTER, "if («threadIdx.x < kCluster»)", "threadIdx.x <= kCluster"),
    Fault(
        "a cluster without room is started",
        "values",
        ONE,
        "if («kCluster > 1 && !has_room(kernel, config)»)",
        "false",
    ),
    Fault(
        "a refused cluster is an error",
        "error 701",
        ONE,
        "if («launched != cudaErrorInvalidClusterSize && launched != cudaErrorLaunchOutOfResources»)",
        "true",
    ),
    Fault("the error of a refused cluster is left", "error 701", ONE, "«cudaGetLastError();»  // else the", ""),
)

PLACES = (
    Fault(
        "the part of another block",
        "values|incomplete|out of bounds",
        ONE,
        "static_cast<int>(«rank») * per_block",
        "rank ^ 1u",
    ),
    Fault(
        "parts divided downwards",
        "values|incomplete",
        ONE,
        "«(place.units + kCluster - 1) / kCluster»",
        "place.units / kCluster",
    ),
    Fault(
        "the last unit of a block left out",
        "values|incomplete",
        ONE,
        "part.sweep(0, «count», place,\n",
        "count - 1",
    ),
    Fault("fills a unit too much", "out of bounds|race", ROW, "«unit < last»; unit += threads", "unit <= last"),
    Fault(
        "units up to the columns only",
        "values|incomplete",
        ROW,
        "«static_cast<int>((a.logits.columns + 7) / 8) * (8 / Unit<T>::kSize)»",
        "static_cast<int>((a.logits.columns + Unit<T>::kSize - 1) / Unit<T>::kSize)",
    ),
    Fault(
        "strides in 32 bits",
        "undefined behaviour|out of bounds",
        ROW,
        "a.logits.logits) + «row * a.logits.logits_stride * (int64_t)sizeof(T)»",
        "static_cast<int>(row) * static_cast<int>(a.logits.logits_stride) * (int)sizeof(T)",
    ),
    Fault("the start of the shard ignored", "values", ROW, "targets[row] - «a.logits.vocab_start»", "0"),
    Fault(
        "loads past the row",
        "out of bounds",
        TWO,
        "«unit < place.units ? units[unit] : empty_unit<T>()»",
        "units[unit]",
    ),
    Fault("stores past the row", "out of bounds", TWO, "if («unit < place.units») gradient_unit", "true"),
    Fault(
        "skipped rows are read",
        "out of bounds",
        TWO,
        "if («row_skipped(a.tokens, row)») {\n        if (kPhase",
        "false",
    ),
    Fault("a block too many", "out of bounds", TWO, "1024, 1><<<«rows», 1024", "rows + 1"),
    Fault(
        "the merge of shards without its bound",
        "out of bounds",
        HOST,
        _COMBINE,
        "store_stats(combined, rows, row, merge_row(stats, ranks, rows, row));",
    ),
    Fault("an empty matrix has a stride", "error -1", HOST, "several = «l.rows > 1 && l.columns > 0»", "l.rows > 1"),
    Fault(
        "one read without a gradient",
        "error 801",
        HOST,
        "if («row_kernel != KLEAR_TWO_READ && logits->gradient»)",
        "row_kernel != KLEAR_TWO_READ",
    ),
)

NUMBERS = (
    Fault("half a pair is not masked", "values", ROW, "kPerWord == 2 && «left == 2 * i + 1»", "left == 2 * i + 3"),
    Fault(
        "the mask is off by one",
        "values",
        ROW,
        "if («left >= Unit<T>::kSize») return raw;",
        "left >= Unit<T>::kSize - 1",
    ),
    Fault(
        "the target is in the next unit",
        "values|race",
        ROW,
        "«place.target / Unit<T>::kSize»",
        "(place.target + 1) / Unit<T>::kSize",
    ),
    Fault(
        "the maximum swallows a NaN",
        "values",
        ROW,
        '«asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));»',
        "y = fmaxf(a, b);",
    ),
    Fault(
        "the halves of a pair exchanged",
        "values",
        ROW,
        '«asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));»',
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(low), "f"(high));',
    ),
    Fault(
        "the padding of a row of NaN is NaN",
        "values",
        ROW,
        "y[i] = «unit * kSize + i < place.valid ? value : 0.0f»",
        "value",
    ),
    Fault(
        "a maximum without its bound",
        "values",
        ROW,
        "«largest * scale > kNoMax ? largest * scale : kNoMax»",
        "largest > -1e38f ? largest * scale : -1e38f",
    ),
    Fault(
        "a NaN is cast to a number",
        "undefined behaviour",
        MATH,
        "«if (!(x >= -125.0f)) return x < -125.0f ? 0.0f : x;»",
        "if (x < -125.0f) return 0.0f;",
    ),
    Fault("the merge forgets to rescale a sum", "values", MATH, "fmaf(shard[rows], «factor», merged.sum)", "1.0f"),
    Fault(
        "the merge forgets to shift the target",
        "values",
        MATH,
        "merged.target = «shard[3 * rows] + shift»",
        "shard[3 * rows]",
    ),
    Fault(
        "a warp's partial is left out",
        "values",
        TWO,
        "p = «threadIdx.x < kThreads / 32» ?",
        "threadIdx.x < kThreads / 32 - 1",
    ),
    Fault(
        "rescaling forgets the spread",
        "values",
        TWO,
        "p.spread = «fmaf(p.sum, shift, p.spread) * factor»",
        "p.spread * factor",
    ),
    Fault("shards merged from the last to the first", "values", HOST, _COMBINE, _BACKWARDS),
)

NEWER = (
    Fault("a coefficient is wrong in its sixth digit", "values", PAIRS, "«2.402224392e-01f»", "2.402230000e-01f"),
    Fault("the power of two is put a bit too low", "values", PAIRS, "__float_as_uint(second) << «23»", "22"),
    Fault(
        "the range is reduced towards the wrong side",
        "values",
        PAIRS,
        "multiply_add(whole, «make_pair(-1.0f, -1.0f)», x)",
        "make_pair(1.0f, 1.0f)",
    ),
    Fault("exponents far below the range", "values", ROW, "max_nan(y, «kMinPolynomial»)", "-300.0f"),
    Fault(
        "the ragged unit goes without its mask",
        "values",
        CLUSTER,
        "min(«place.valid / Unit<T>::kSize - first», stop)",
        "stop",
    ),
    Fault(
        "infinities are not made finite",
        "values",
        ROW,
        "polynomial ? words[i] : «bounded_halves(words[i])»",
        "words[i]",
    ),
    Fault("the second sum of a pair is forgotten", "values", ROW, "return {«a + b», c + d};", "a"),
)
"""In code that only sm_100 and its family run."""

FAULTS = (*BARRIERS, *COPIES, *CLUSTERS, *PLACES, *NUMBERS, *NEWER)
