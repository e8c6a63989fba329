// A cluster of blocks a row, for devices that have clusters (sm_90, sm_100): the row is copied to shared memory once,
// by bulk copies, and stays there for the maximum, the sums and the gradient. One read and one write of device memory.
#include "cuda_row.cuh"

namespace klear {
namespace {

constexpr int kThreads = 384;  // with three blocks a multiprocessor, 56 registers a thread
constexpr int kWarps = kThreads / 32;
constexpr int kPieces = 4;                  // bulk copies a block, so that the maximum starts on the first
constexpr int kBlocksPerSm = 3;             // what hides one row's reductions behind another's copies
constexpr int64_t kComfortable = 76288;     // bytes of a row a block, so that three fit in 228 KiB

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define KLEAR_HAS_CLUSTERS 1
#endif

#ifdef KLEAR_HAS_CLUSTERS
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra WAIT_%=;\n"
        "}" ::"r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void store_to_peer(float* pointer, uint32_t peer, float value) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(peer));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Says that this block has started, and orders no memory: a release would hold up the copies until the device's memory
// has seen what came before.
__device__ __forceinline__ void cluster_arrive_started() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// This block's part of a row, in shared memory.
template <class T>
struct Part {
    const uint4* units;
    int first;  // index in the row of units[0]
    int count;
    int per_piece;

    __device__ __forceinline__ uint4 load(int i, const RowPlace<T>& place) const {
        return masked_unit<T>(units[i], first + i, place.valid);
    }

    // Calls `each` with this thread's units of [start, stop) and their index: first those that need no mask.
    template <class Each>
    __device__ __forceinline__ void sweep(int start, int stop, const RowPlace<T>& place, Each each) const {
        const int whole = min(place.valid / Unit<T>::kSize - first, stop);
        int i = start + static_cast<int>(threadIdx.x);
#pragma unroll 2
        for (; i < whole; i += kThreads) each(units[i], i);
#pragma unroll 1
        for (; i < stop; i += kThreads) each(load(i, place), i);
    }
};

template <class T>
__device__ __forceinline__ void start_copies(const Part<T>& part, const RowPlace<T>& place, uint64_t* barriers) {
    for (int i = 0; i < kPieces; ++i) barrier_init(&barriers[i]);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const uint4* row = reinterpret_cast<const uint4*>(place.logits);
    for (int i = 0; i < kPieces; ++i) {
        const int start = i * part.per_piece;
        const int units = min(part.count - start, part.per_piece);
        const uint32_t bytes = units > 0 ? units * 16u : 0u;
        barrier_expect(&barriers[i], bytes);
        if (bytes) bulk_copy(const_cast<uint4*>(part.units) + start, row + part.first + start, bytes, &barriers[i]);
    }
}

__device__ __forceinline__ float block_max(float value) {
    __shared__ float warps[kWarps];
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = warps[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) value = fmaxf(value, warps[i]);
    return value;
}

// Valid in every thread of the first warp.
__device__ __forceinline__ float2 block_sums(float2 value) {
    __shared__ float2 warps[kWarps];
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
        value.x += __shfl_xor_sync(~0u, value.x, distance);
        value.y += __shfl_xor_sync(~0u, value.y, distance);
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = warps[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
        value.x += warps[i].x;
        value.y += warps[i].y;
    }
    return value;
}

// Statistics of this block's part, against its own maximum. Valid in the first warp.
template <class T>
__device__ __forceinline__ RowStats part_stats(const Part<T>& part, const RowPlace<T>& place, uint64_t* barriers) {
    Largest<T> largest;
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
        barrier_wait(&barriers[piece]);
        const int stop = min(part.count, (piece + 1) * part.per_piece);
        if constexpr (kPairs) {
            part.sweep(piece * part.per_piece, stop, place, [&](const uint4& raw, int) { largest.add(raw); });
        } else {
#pragma unroll 2
            for (int i = piece * part.per_piece + threadIdx.x; i < stop; i += kThreads)
                largest.add(part.load(i, place));
        }
    }
    const float max = scaled_max(block_max(largest.get()), place.scale);
    Sums<T> own(0.0f, 0.0f);
    if constexpr (kPairs) {
        part.sweep(0, part.count, place,
                   [&](const uint4& raw, int) { own.template add_unit<true>(raw, place.scale, max); });
    } else {
#pragma unroll 2
        for (int i = threadIdx.x; i < part.count; i += kThreads)
            own.add_unit(part.load(i, place), place.scale, max);
    }
    const float2 sums = block_sums(own.get());
    return {max, sums.x, sums.y, INFINITY};
}

// The row's statistics in thread 0 of each block. Past this point every block has read all it needs of the logits.
template <int kCluster>
__device__ __forceinline__ RowStats cluster_stats(const RowStats& own, uint32_t rank) {
    if constexpr (kCluster == 1) {
        return own;
    } else {
        __shared__ float parts[kCluster * 4];
        cluster_wait();  // the peers have started: their shared memory is there
        if (threadIdx.x < kCluster) {
            const float values[4] = {own.max, own.sum, own.spread, own.target};
#pragma unroll
            for (int i = 0; i < 4; ++i) store_to_peer(&parts[rank * 4 + i], threadIdx.x, values[i]);
        }
        __syncwarp();
        cluster_arrive();
        cluster_wait();
        return threadIdx.x == 0 ? merge_row(parts, kCluster, 1, 0) : own;
    }
}
#endif

template <class T, class G, int kCluster>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) one_read_rows(const RowArguments a) {
#ifdef KLEAR_HAS_CLUSTERS
    extern __shared__ __align__(128) uint4 units[];
    __shared__ __align__(8) uint64_t barriers[kPieces];
    __shared__ RowGradient shared;
    uint32_t rank = 0;
    if constexpr (kCluster > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    const int64_t row = blockIdx.x / kCluster;
    const RowPlace<T> place = place_row<T, G>(a, row);
    const int per_block = (place.units + kCluster - 1) / kCluster;
    const int first = static_cast<int>(rank) * per_block;
    const int last = min(first + per_block, place.units);
    if (row_skipped(a.tokens, row)) {
        if (rank == 0 && threadIdx.x == 0) store_skipped(a.out, row);
        fill_units<T, G>(place, first, last, kThreads, 0.0f);
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
    RowStats stats = cluster_stats<kCluster>(part_stats<T>(part, place, barriers), rank);
    if (threadIdx.x == 0) {
        stats.target = place.target < 0 ? INFINITY : fmaf(target, place.scale, -stats.max);
        shared = finish_row(stats, a.tokens, a.loss, a.out, row, rank == 0);
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

template <class Kernel>
cudaError_t prepare(Kernel* kernel, int64_t most) {
    cudaFuncAttributes made;
    cudaError_t error = cudaFuncGetAttributes(&made, kernel);
    if (error != cudaSuccess) return error;
    if (made.ptxVersion < 90) return cudaErrorNotSupported;  // the driver compiled PTX in which the body is left out
    // The device's most at every launch: another thread may be launching this kernel for another width.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// False where the device says that no cluster can ever run, as on a small MIG slice; an error is left to the launch.
template <class Kernel>
bool has_room(Kernel* kernel, const cudaLaunchConfig_t& config) {
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters > 0;
    cudaGetLastError();
    return true;
}

template <class T, class G, int kCluster>
cudaError_t launch(const RowArguments& a, int64_t bytes, int64_t most, cudaStream_t stream) {
    auto kernel = one_read_rows<T, G, kCluster>;
    const int shared_bytes = static_cast<int>((bytes + kCluster - 1) / kCluster + 15) / 16 * 16;
    const cudaError_t error = prepare(kernel, most);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kCluster;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(a.logits.rows * kCluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = kCluster > 1 ? 1 : 0;
    if (kCluster > 1 && !has_room(kernel, config)) return cudaErrorNotSupported;
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, a);
    if (launched != cudaErrorInvalidClusterSize && launched != cudaErrorLaunchOutOfResources) return launched;
    cudaGetLastError();  // else the launch that takes this one's place would report it as its own
    return cudaErrorNotSupported;
}

template <class T, class G>
cudaError_t launch_cluster(const RowArguments& a, int64_t bytes, int64_t most, cudaStream_t stream) {
    if (bytes <= kComfortable) return launch<T, G, 1>(a, bytes, most, stream);
    if (bytes <= 2 * kComfortable) return launch<T, G, 2>(a, bytes, most, stream);
    if (bytes <= 4 * kComfortable) return launch<T, G, 4>(a, bytes, most, stream);
    if (bytes <= 8 * most) return launch<T, G, 8>(a, bytes, most, stream);
    return cudaErrorNotSupported;
}

}  // namespace

cudaError_t launch_one_read(const RowArguments& a, cudaStream_t stream) {
    int device = 0, major = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    if ((major != 9 && major != 10) || !a.logits.gradient) return cudaErrorNotSupported;
    const int64_t size = a.logits.logits_type == KLEAR_F32 ? 4 : 2;
    const int64_t bytes = (a.logits.columns + 7) / 8 * 8 * size;
    const int64_t room = most - 2048;  // less what the kernel itself keeps in shared memory
    if (a.logits.logits_type == KLEAR_BF16) return launch_cluster<bf16, bf16>(a, bytes, room, stream);
    if (a.logits.gradient_type == KLEAR_BF16) return launch_cluster<float, bf16>(a, bytes, room, stream);
    return launch_cluster<float, float>(a, bytes, room, stream);
}

}  // namespace klear
