// A row of a sharded vocabulary in one read (sm_90, sm_100): each rank's cluster of blocks copies its shard of the row
// to shared memory, posts the shard's statistics to every rank's mailbox, waits for those of the others, merges all in
// rank order as combine_rows does, and writes its gradient from shared memory. It waits for other devices inside the
// kernel.
//
// Why it cannot stand still. On each rank a counter gives the rows to the clusters in the order in which these start,
// so the rows taken are always the first ones, and a rank of which any cluster has room goes on taking them; nothing is
// assumed of the order in which a device starts its blocks. (1) Between taking a row and posting it a cluster waits for
// its own blocks and copies alone, which the device runs together. (2) It waits for posts of its own row only. Take the
// first row that some rank has not finished. Every rank finished all rows before it. A rank that has taken the row has
// posted it or will, by (1). On one that has not, all clusters that ever started have finished, so there is room, and
// the next to start takes this row. So every rank posts the row, and by (2) every rank finishes it. It takes for
// granted that each rank's kernel comes to run: that it is not queued behind something which waits for another rank's
// kernel of this launch. Where that fails, or a peer has died, a wait ends after `timeout_ns` in a trap, an error of
// every later CUDA call.
//
// Why a mailbox needs no reset. Entries bear the number of their launch, and launches take turns between two halves of
// a mailbox. A rank writes again into a half only in the second launch after; by then every peer has posted a row of
// the launch between, so it had finished the one before, and has read the half. For that the first row of each launch
// is posted and awaited even if it has no weight. A number comes back after 2^32 launches.
#include "cuda_cluster.cuh"

namespace klear {
namespace {

constexpr int64_t kComfortable = 76032;  // bytes of a row a block, so that three fit in 228 KiB

// What a rank says of a row: in a mailbox of [2, capacity, ranks] of them.
struct __align__(32) Post {
    uint4 stats;  // max, sum, spread and target of RowStats, as bits
    uint32_t generation;
    uint32_t unused[3];
};

struct ShardedArguments {
    RowArguments row;
    Post* mailboxes[KLEAR_MOST_RANKS];
    uint32_t* ticket;
    int64_t capacity;
    uint64_t timeout_ns;
    uint32_t ranks, rank, generation;
};

#ifdef KLEAR_HAS_CLUSTERS
// What this thread wrote before is seen by whoever acquires the number, on any device.
__device__ __forceinline__ void store_release(uint32_t* to, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

__device__ __forceinline__ uint32_t load_from_first(const uint32_t* pointer) {
    uint32_t address, value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(0));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// The next row, for all blocks of the cluster. The counter is 0 again once the last row is taken.
template <int kCluster>
__device__ __forceinline__ int64_t take_row(const ShardedArguments& a, uint32_t block) {
    __shared__ uint32_t taken;
    if (block == 0 && threadIdx.x == 0) taken = atomicInc(a.ticket, static_cast<uint32_t>(a.row.logits.rows - 1));
    if constexpr (kCluster == 1) {
        __syncthreads();
        return taken;
    } else {
        __syncwarp();
        cluster_arrive();
        cluster_wait();
        return load_from_first(&taken);
    }
}

__device__ __forceinline__ Post* post_of(const ShardedArguments& a, uint32_t mailbox, int64_t row, uint32_t from) {
    return a.mailboxes[mailbox] + ((a.generation & 1) * a.capacity + row) * a.ranks + from;
}

__device__ __forceinline__ void post(Post* to, const RowStats& own, uint32_t generation) {
    to->stats = make_uint4(__float_as_uint(own.max), __float_as_uint(own.sum), __float_as_uint(own.spread),
                           __float_as_uint(own.target));
    store_release(&to->generation, generation);
}

__device__ __forceinline__ uint4 await_post(const Post* from, uint32_t generation, uint64_t timeout_ns) {
    const uint64_t start = nanoseconds();
    while (load_acquire(&from->generation) != generation) {
        if (nanoseconds() - start > timeout_ns) asm volatile("trap;");
    }
    return from->stats;
}

// By one whole warp: posts `own` to all ranks where `posts`, then leaves all ranks' statistics in `all`, in rank order.
// Each block of a cluster waits by itself, for the post of its first.
__device__ __forceinline__ void exchange(const ShardedArguments& a, int64_t row, bool posts, const RowStats& own,
                                         float* all) {
    const uint32_t peer = threadIdx.x;
    if (posts && peer < a.ranks) post(post_of(a, peer, row, a.rank), own, a.generation);
    __syncwarp();
    if (peer < a.ranks) {
        const uint4 stats = await_post(post_of(a, a.rank, row, peer), a.generation, a.timeout_ns);
        all[4 * peer] = __uint_as_float(stats.x);
        all[4 * peer + 1] = __uint_as_float(stats.y);
        all[4 * peer + 2] = __uint_as_float(stats.z);
        all[4 * peer + 3] = __uint_as_float(stats.w);
    }
    __syncwarp();
}
#endif

template <class T, class G, int kCluster>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) sharded_rows(const ShardedArguments a) {
#ifdef KLEAR_HAS_CLUSTERS
    extern __shared__ __align__(128) uint4 units[];
    __shared__ __align__(8) uint64_t barriers[kPieces];
    __shared__ RowGradient shared;
    __shared__ RowStats own;
    __shared__ float all[4 * KLEAR_MOST_RANKS];
    uint32_t block = 0;
    if constexpr (kCluster > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
    const int64_t row = take_row<kCluster>(a, block);
    const RowPlace<T> place = place_row<T, G>(a.row, row);
    const int per_block = (place.units + kCluster - 1) / kCluster;
    const int first = static_cast<int>(block) * per_block;
    const int last = min(first + per_block, place.units);
    if (row_skipped(a.row.tokens, row)) {
        if (block == 0 && threadIdx.x == 0) store_skipped(a.row.out, row);
        fill_units<T, G>(place, first, last, kThreads, 0.0f);
        if (row == 0 && block == 0 && threadIdx.x < 32) exchange(a, row, true, {0.0f, 1.0f, 0.0f, 0.0f}, all);
        if constexpr (kCluster > 1) {  // the first block stays until its peers have read the row
            __syncwarp();
            cluster_arrive();
            cluster_wait();
        }
        return;
    }
    const int count = max(last - first, 0);
    const Part<T> part = {units, first, count, (count + kPieces - 1) / kPieces};
    float target = 0.0f;
    if constexpr (kCluster > 1) cluster_arrive_started();
    if (threadIdx.x == 0) {
        start_copies<T>(part, place, barriers);
        if (place.target >= 0) target = Unit<T>::load(place.logits, place.target);
    }
    __syncthreads();
    const RowStats shard = cluster_stats<kCluster>(part_stats<T>(part, place, barriers), block);
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) {
            own = {shard.max, shard.sum, shard.spread,
                   place.target < 0 ? INFINITY : fmaf(target, place.scale, -shard.max)};
        }
        __syncwarp();
        exchange(a, row, block == 0, own, all);
        if (threadIdx.x == 0) {
            const RowStats merged = merge_row(all, a.ranks, 1, 0);
            shared = finish_row(merged, a.row.tokens, a.row.loss, a.row.out, row, block == 0);
        }
    }
    __syncthreads();
    const RowGradient gradient = shared;
    if (constant_gradient(gradient)) {
        fill_units<T, G>(place, first, last, kThreads, gradient.zero ? 0.0f : NAN);
        return;
    }
    if constexpr (kPairs) {
        part.sweep(0, count, place,
                   [&](const uint4& raw, int i) { gradient_unit<T, G, true>(raw, first + i, place, gradient); });
    } else {
#pragma unroll 2
        for (int i = threadIdx.x; i < count; i += kThreads)
            gradient_unit<T, G>(part.load(i, place), first + i, place, gradient);
    }
#endif
}

// Asks only, where `a` is null. Once a rank has started, the others cannot go another way: a refusal is an error.
template <class T, class G, int kCluster>
cudaError_t launch(const klear_logits& logits, const ShardedArguments* a, int64_t bytes, int64_t room,
                   cudaStream_t stream) {
    auto kernel = sharded_rows<T, G, kCluster>;
    const cudaError_t error = prepare(kernel, room);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_config<kCluster>(logits.rows, bytes, stream, attribute);
    if (a) return cudaLaunchKernelEx(&config, kernel, *a);
    return kCluster == 1 || has_room(kernel, config) ? cudaSuccess : cudaErrorNotSupported;
}

template <class T, class G>
cudaError_t launch_cluster(const klear_logits& logits, const ShardedArguments* a, int64_t room, cudaStream_t stream) {
    const int64_t bytes = row_bytes(logits);
    if (bytes <= kComfortable) return launch<T, G, 1>(logits, a, bytes, room, stream);
    if (bytes <= 2 * kComfortable) return launch<T, G, 2>(logits, a, bytes, room, stream);
    if (bytes <= 4 * kComfortable) return launch<T, G, 4>(logits, a, bytes, room, stream);
    if (bytes <= 8 * room) return launch<T, G, 8>(logits, a, bytes, room, stream);
    return cudaErrorNotSupported;
}

cudaError_t launch_types(const klear_logits& logits, const ShardedArguments* a, cudaStream_t stream) {
    int64_t room = 0;
    const cudaError_t error = room_for_parts(room);
    if (error != cudaSuccess) return error;
    if (logits.logits_type == KLEAR_BF16) return launch_cluster<bf16, bf16>(logits, a, room, stream);
    if (logits.gradient_type == KLEAR_BF16) return launch_cluster<float, bf16>(logits, a, room, stream);
    return launch_cluster<float, float>(logits, a, room, stream);
}

}  // namespace

int64_t post_bytes() { return sizeof(Post); }

cudaError_t sharded_fits(const klear_logits& logits) { return launch_types(logits, nullptr, nullptr); }

cudaError_t launch_sharded(const RowArguments& row, const klear_peers& peers, cudaStream_t stream) {
    ShardedArguments a = {};
    a.row = row;
    for (int i = 0; i < peers.ranks; ++i) a.mailboxes[i] = reinterpret_cast<Post*>(peers.mailboxes[i]);
    a.ticket = peers.ticket;
    a.capacity = peers.capacity;
    a.timeout_ns = static_cast<uint64_t>(peers.timeout_ns);
    a.ranks = static_cast<uint32_t>(peers.ranks);
    a.rank = static_cast<uint32_t>(peers.rank);
    a.generation = static_cast<uint32_t>(peers.generation);
    return launch_types(row.logits, &a, stream);
}

}  // namespace klear
