// A block a row: one read for the statistics, one read and one write for the gradient. Runs everywhere, does each phase
// of the sharded vocabulary, and is the one pass of devices without clusters, where the second read comes mostly from
// the second-level cache.
#include "cuda_row.cuh"

namespace klear {
namespace {

constexpr int kBatch = 4;  // units in flight a thread

struct Partial {
    float max, sum, spread;
};

__device__ __forceinline__ void raise(Partial& p, float max) {
    if (!(max > p.max)) return;
    const float shift = p.max - max;
    const float factor = exp2_approx(shift);
    p.spread = fmaf(p.sum, shift, p.spread) * factor;
    p.sum *= factor;
    p.max = max;
}

__device__ __forceinline__ Partial merge(Partial a, Partial b) {
    const float max = fmaxf(a.max, b.max);
    raise(a, max);
    raise(b, max);
    return {max, a.sum + b.sum, a.spread + b.spread};
}

__device__ __forceinline__ Partial merge_warp(Partial p) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
        const Partial other = {__shfl_down_sync(~0u, p.max, distance), __shfl_down_sync(~0u, p.sum, distance),
                               __shfl_down_sync(~0u, p.spread, distance)};
        p = merge(p, other);
    }
    return p;
}

template <class T>
__device__ __forceinline__ void load_batch(const RowPlace<T>& place, int start, int threads, uint4 (&raw)[kBatch]) {
    const uint4* units = reinterpret_cast<const uint4*>(place.logits);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        const int unit = start + static_cast<int>(threadIdx.x) + i * threads;
        raw[i] = unit < place.units ? units[unit] : empty_unit<T>();
        raw[i] = masked_unit<T>(raw[i], unit, place.valid);
    }
}

// Valid in thread 0.
template <class T, int kThreads>
__device__ __forceinline__ Partial row_partial(const RowPlace<T>& place) {
    __shared__ Partial warps[kThreads / 32];
    Partial p = {kNoMax, 0.0f, 0.0f};
    for (int start = 0; start < place.units; start += kThreads * kBatch) {
        uint4 raw[kBatch];
        load_batch<T>(place, start, kThreads, raw);
        Largest<T> largest = Largest<T>::of(raw[0]);
#pragma unroll
        for (int i = 1; i < kBatch; ++i) largest.add(raw[i]);
        raise(p, scaled_max(largest.get(), place.scale));
        Sums<T> sums(p.sum, p.spread);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) sums.add_unit(raw[i], place.scale, p.max);
        const float2 done = sums.get();
        p.sum = done.x;
        p.spread = done.y;
    }
    p = merge_warp(p);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = p;
    __syncthreads();
    if (threadIdx.x < 32) {
        p = threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : Partial{kNoMax, 0.0f, 0.0f};
        p = merge_warp(p);
    }
    return p;
}

template <class T, class G, int kThreads>
__device__ __forceinline__ void write_gradient(const RowArguments& a, const RowPlace<T>& place, const RowGradient& g) {
    // Narrowed in place, a batch is written over columns that other threads may still have to read.
    const bool narrowed = sizeof(G) < sizeof(T) && a.logits.gradient == a.logits.logits;
    for (int start = 0; start < place.units; start += kThreads * kBatch) {
        uint4 raw[kBatch];
        load_batch<T>(place, start, kThreads, raw);
        if (narrowed) __syncthreads();
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int unit = start + static_cast<int>(threadIdx.x) + i * kThreads;
            if (unit < place.units) gradient_unit<T, G>(raw[i], unit, place, g);
        }
    }
}

template <class T, class G, int kPhase, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) two_read_rows(const RowArguments a) {
    __shared__ RowGradient shared;
    const int64_t row = blockIdx.x;
    const RowPlace<T> place = place_row<T, G>(a, row);
    if (row_skipped(a.tokens, row)) {
        if (kPhase == kStats) {
            if (threadIdx.x == 0) store_stats(a.stats, a.logits.rows, row, {0.0f, 1.0f, 0.0f, 0.0f});
            return;
        }
        if (threadIdx.x == 0) store_skipped(a.out, row);
        if (a.logits.gradient) fill_units<T, G>(place, 0, place.units, kThreads, 0.0f);
        return;
    }
    RowStats stats = {};
    if (kPhase != kFinish) {
        const float target =
            threadIdx.x == 0 && place.target >= 0 ? Unit<T>::load(place.logits, place.target) : INFINITY;
        const Partial p = row_partial<T, kThreads>(place);
        stats = {p.max, p.sum, p.spread, place.target < 0 ? INFINITY : fmaf(target, place.scale, -p.max)};
    }
    if (kPhase == kStats) {
        if (threadIdx.x == 0) store_stats(a.stats, a.logits.rows, row, stats);
        return;
    }
    if (threadIdx.x == 0) {
        if (kPhase == kFinish) stats = load_stats(a.stats, a.logits.rows, row);
        shared = finish_row(stats, a.tokens, a.loss, a.out, row, true);
    }
    if (!a.logits.gradient) return;
    __syncthreads();
    const RowGradient gradient = shared;
    if (constant_gradient(gradient))
        fill_units<T, G>(place, 0, place.units, kThreads, gradient.zero ? 0.0f : NAN);
    else
        write_gradient<T, G, kThreads>(a, place, gradient);
}

template <class T, class G>
void launch(const RowArguments& a, int phase, cudaStream_t stream) {
    const unsigned rows = static_cast<unsigned>(a.logits.rows);
    if (phase == kStats)
        two_read_rows<T, T, kStats, 512, 2><<<rows, 512, 0, stream>>>(a);
    else if (phase == kFinish)
        two_read_rows<T, G, kFinish, 512, 2><<<rows, 512, 0, stream>>>(a);
    else  // one block a multiprocessor: the rows between their two reads then fit in the cache
        two_read_rows<T, G, kOnePass, 1024, 1><<<rows, 1024, 0, stream>>>(a);
}

}  // namespace

cudaError_t launch_two_read(const RowArguments& a, int phase, cudaStream_t stream) {
    if (a.logits.logits_type == KLEAR_BF16)
        launch<bf16, bf16>(a, phase, stream);
    else if (a.logits.gradient_type == KLEAR_BF16)
        launch<float, bf16>(a, phase, stream);
    else
        launch<float, float>(a, phase, stream);
    return cudaGetLastError();
}

}  // namespace klear
