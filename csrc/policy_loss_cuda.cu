// The C interface on CUDA: argument checks, choice of kernel, and the kernels that need no logits.
#include "cuda_row.cuh"

#ifndef KLEAR_CUDA_ARCHS
#define KLEAR_CUDA_ARCHS "unknown"
#endif

namespace klear {
namespace {

constexpr int kThreads = 128;

__global__ void combine_rows(const float* stats, int64_t ranks, int64_t rows, float* combined) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row < rows) store_stats(combined, rows, row, merge_row(stats, ranks, rows, row));
}

__global__ void finish_without_logits(const RowArguments a) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= a.logits.rows) return;
    if (row_skipped(a.tokens, row))
        store_skipped(a.out, row);
    else
        finish_row(load_stats(a.stats, a.logits.rows, row), a.tokens, a.loss, a.out, row, true);
}

unsigned blocks_for(int64_t rows) { return static_cast<unsigned>((rows + kThreads - 1) / kThreads); }

bool aligned(const void* pointer, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size % 16 == 0;
}

bool valid(const klear_logits& l) {
    const bool types = l.logits_type == KLEAR_F32 ? l.gradient_type == KLEAR_F32 || l.gradient_type == KLEAR_BF16
                                                  : l.logits_type == KLEAR_BF16 && l.gradient_type == KLEAR_BF16;
    const int64_t logit_size = l.logits_type == KLEAR_F32 ? 4 : 2, gradient_size = l.gradient_type == KLEAR_F32 ? 4 : 2;
    const bool several = l.rows > 1 && l.columns > 0;  // else there is no stride to speak of
    return types && l.rows >= 0 && l.rows < (int64_t{1} << 28) && l.columns >= 0 && l.columns < (int64_t{1} << 30) &&
           l.valid_columns >= 0 &&
           l.valid_columns <= l.columns && aligned(l.logits, several ? l.logits_stride : 0, logit_size) &&
           aligned(l.gradient, several ? l.gradient_stride : 0, gradient_size);
}

}  // namespace
}  // namespace klear

using namespace klear;

int klear_cuda_rows(const klear_logits* logits, const klear_tokens* tokens, const klear_coefficients* loss,
                    const klear_outputs* out, int row_kernel, int device, void* stream) {
    if (!valid(*logits)) return KLEAR_BAD_ARGUMENT;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess || logits->rows == 0) return error;
    const RowArguments arguments = {*logits, *tokens, *loss, *out, nullptr};
    if (row_kernel != KLEAR_TWO_READ && logits->gradient) {
        const cudaError_t launched = launch_one_read(arguments, static_cast<cudaStream_t>(stream));
        if (launched != cudaErrorNotSupported || row_kernel == KLEAR_ONE_READ) return launched;
    }
    return launch_two_read(arguments, kOnePass, static_cast<cudaStream_t>(stream));
}

int klear_cuda_stats(const klear_logits* logits, const klear_tokens* tokens, float* stats, int device, void* stream) {
    if (!valid(*logits)) return KLEAR_BAD_ARGUMENT;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess || logits->rows == 0) return error;
    return launch_two_read({*logits, *tokens, {}, {}, stats}, kStats, static_cast<cudaStream_t>(stream));
}

int klear_cuda_combine(const float* stats, int64_t ranks, int64_t rows, float* combined, int device, void* stream) {
    if (ranks < 1 || rows < 0) return KLEAR_BAD_ARGUMENT;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess || rows == 0) return error;
    combine_rows<<<blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(stats, ranks, rows, combined);
    return cudaGetLastError();
}

int klear_cuda_finish(const klear_logits* logits, const klear_tokens* tokens, const klear_coefficients* loss,
                      const float* combined, const klear_outputs* out, int device, void* stream) {
    if (!valid(*logits)) return KLEAR_BAD_ARGUMENT;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess || logits->rows == 0) return error;
    const RowArguments arguments = {*logits, *tokens, *loss, *out, const_cast<float*>(combined)};
    if (logits->gradient) return launch_two_read(arguments, kFinish, static_cast<cudaStream_t>(stream));
    finish_without_logits<<<blocks_for(logits->rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
    return cudaGetLastError();
}

int klear_cuda_sharded_rows(const klear_logits* logits, const klear_tokens* tokens, const klear_coefficients* loss,
                            const klear_outputs* out, const klear_peers* peers, int device, void* stream) {
    const klear_peers& p = *peers;
    if (!valid(*logits) || !logits->gradient || p.ranks < 2 || p.ranks > KLEAR_MOST_RANKS || p.rank < 0 ||
        p.rank >= p.ranks || logits->rows > p.capacity || p.generation < 1 || p.timeout_ns < 1)
        return KLEAR_BAD_ARGUMENT;
    for (int i = 0; i < p.ranks; ++i)
        if (!p.mailboxes[i] || p.mailboxes[i] % 32) return KLEAR_BAD_ARGUMENT;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess || logits->rows == 0) return error;
    return launch_sharded({*logits, *tokens, *loss, *out, nullptr}, p, static_cast<cudaStream_t>(stream));
}

int klear_cuda_sharded_fits(const klear_logits* logits, int device) {
    if (!valid(*logits)) return KLEAR_BAD_ARGUMENT;
    const cudaError_t error = cudaSetDevice(device);
    return error == cudaSuccess ? sharded_fits(*logits) : error;
}

int64_t klear_cuda_mailbox_bytes(int64_t ranks, int64_t capacity) { return 2 * ranks * capacity * post_bytes(); }

int klear_cuda_device_count(int* count) { return cudaGetDeviceCount(count); }

const char* klear_cuda_archs(void) { return KLEAR_CUDA_ARCHS; }

const char* klear_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
