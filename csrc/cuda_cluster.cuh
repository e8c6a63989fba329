// What the kernels with a cluster of blocks a row share: a row's part in shared memory, brought there by bulk copies, its
// statistics, and the launch.
#pragma once

#include "cuda_row.cuh"

namespace klear {
namespace {

constexpr int kThreads = 384;  // with three blocks a multiprocessor, 56 registers a thread
constexpr int kWarps = kThreads / 32;
constexpr int kPieces = 4;                  // bulk copies a block, so that the maximum starts on the first
constexpr int kBlocksPerSm = 3;             // what hides one row's reductions behind another's copies

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

// The configuration of a cluster a row. `attribute` must live as long as it.
template <int kCluster>
cudaLaunchConfig_t cluster_config(int64_t rows, int64_t bytes, cudaStream_t stream, cudaLaunchAttribute& attribute) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kCluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(rows * kCluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>((bytes + kCluster - 1) / kCluster + 15) / 16 * 16;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = kCluster > 1 ? 1 : 0;
    return config;
}

// A device's shared memory for a part of a row; cudaErrorNotSupported where it has no clusters.
inline cudaError_t room_for_parts(int64_t& room) {
    int device = 0, major = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    room = most - 2048;  // less what the kernel itself keeps in shared memory
    return major == 9 || major == 10 ? cudaSuccess : cudaErrorNotSupported;
}

// Bytes of a row, up to the next multiple of 8 columns.
inline int64_t row_bytes(const klear_logits& logits) {
    return (logits.columns + 7) / 8 * 8 * (logits.logits_type == KLEAR_F32 ? 4 : 2);
}

}  // namespace
}  // namespace klear
