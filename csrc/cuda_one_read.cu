// A cluster of blocks a row, for devices that have clusters (sm_90, sm_100): the row is copied to shared memory once,
// by bulk copies, and stays there for the maximum, the sums and the gradient. One read and one write of device memory.
#include "cuda_cluster.cuh"

namespace klear {
namespace {

constexpr int64_t kComfortable = 76288;  // bytes of a row a block, so that three fit in 228 KiB

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

template <class T, class G, int kCluster>
cudaError_t launch(const RowArguments& a, int64_t bytes, int64_t room, cudaStream_t stream) {
    auto kernel = one_read_rows<T, G, kCluster>;
    const cudaError_t error = prepare(kernel, room);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_config<kCluster>(a.logits.rows, bytes, stream, attribute);
    if (kCluster > 1 && !has_room(kernel, config)) return cudaErrorNotSupported;
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, a);
    if (launched != cudaErrorInvalidClusterSize && launched != cudaErrorLaunchOutOfResources) return launched;
    cudaGetLastError();  // else the launch that takes this one's place would report it as its own
    return cudaErrorNotSupported;
}

template <class T, class G>
cudaError_t launch_cluster(const RowArguments& a, int64_t bytes, int64_t room, cudaStream_t stream) {
    if (bytes <= kComfortable) return launch<T, G, 1>(a, bytes, room, stream);
    if (bytes <= 2 * kComfortable) return launch<T, G, 2>(a, bytes, room, stream);
    if (bytes <= 4 * kComfortable) return launch<T, G, 4>(a, bytes, room, stream);
    if (bytes <= 8 * room) return launch<T, G, 8>(a, bytes, room, stream);
    return cudaErrorNotSupported;
}

}  // namespace

cudaError_t launch_one_read(const RowArguments& a, cudaStream_t stream) {
    int64_t room = 0;
    const cudaError_t error = room_for_parts(room);
    if (error != cudaSuccess) return error;
    if (!a.logits.gradient) return cudaErrorNotSupported;
    const int64_t bytes = row_bytes(a.logits);
    if (a.logits.logits_type == KLEAR_BF16) return launch_cluster<bf16, bf16>(a, bytes, room, stream);
    if (a.logits.gradient_type == KLEAR_BF16) return launch_cluster<float, bf16>(a, bytes, room, stream);
    return launch_cluster<float, float>(a, bytes, room, stream);
}

}  // namespace klear
