// The CPU twin: rows in parallel, each by one thread, so that the result knows neither threads nor chunks.
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "cpu_isa.h"

namespace klear {
namespace {

const CpuIsa* select_isa() {
    const char* forced = getenv("KLEAR_CPU_ISA");
    if (forced && !*forced) forced = nullptr;
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && (!forced || !strcmp(forced, kAvx512Isa.name))) return &kAvx512Isa;
    if (avx2 && (!forced || !strcmp(forced, kAvx2Isa.name))) return &kAvx2Isa;
#endif
    return !forced || !strcmp(forced, kScalarIsa.name) ? &kScalarIsa : nullptr;
}

bool valid(const klear_logits& logits) {
    const bool types = logits.logits_type == KLEAR_F32
                           ? logits.gradient_type == KLEAR_F32 || logits.gradient_type == KLEAR_BF16
                           : logits.logits_type == KLEAR_BF16 && logits.gradient_type == KLEAR_BF16;
    return types && logits.rows >= 0 && logits.columns >= 0 && logits.valid_columns >= 0 &&
           logits.valid_columns <= logits.columns;
}

int64_t size_of(int32_t type) { return type == KLEAR_F32 ? 4 : 2; }

struct Row {
    const char* logits;
    char* gradient;
    int64_t target;  // column, -1 where it is not in this shard
    float scale;
};

Row row_at(const klear_logits& logits, const klear_tokens& tokens, int64_t row) {
    const int64_t target = tokens.targets ? tokens.targets[row] - logits.vocab_start : -1;
    char* gradient = static_cast<char*>(logits.gradient);
    if (gradient) gradient += row * logits.gradient_stride * size_of(logits.gradient_type);
    return {static_cast<const char*>(logits.logits) + row * logits.logits_stride * size_of(logits.logits_type), gradient,
            target >= 0 && target < logits.valid_columns ? target : -1, kLog2e / row_temperature(tokens, row)};
}

float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0u;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float logit_at(const klear_logits& logits, const Row& row, int64_t column) {
    float value;
    uint16_t half;
    if (logits.logits_type == KLEAR_F32) {
        memcpy(&value, row.logits + 4 * column, sizeof value);
        return value;
    }
    memcpy(&half, row.logits + 2 * column, sizeof half);
    return from_bf16(half);
}

// Room for a row's powers and its blocks' maxima, one a thread.
struct Powers {
    float* row;
    float* maxima;
};

RowStats stats_of(const CpuIsa& isa, const klear_logits& logits, const Row& row, Powers powers) {
    RowStats stats;
    // read first: the powers may overwrite it
    const float target = row.target < 0 ? 0.0f : logit_at(logits, row, row.target);
    (logits.logits_type == KLEAR_F32 ? isa.stats_f32 : isa.stats_bf16)(row.logits, logits.valid_columns, row.scale,
                                                                      &stats, powers.row, powers.maxima);
    stats.target = row.target < 0 ? INFINITY : fmaf(target, row.scale, -stats.max);
    return stats;
}

// A second exponential for each column would cost more than writing and reading the first. The entropy term needs the
// exponents too, and computes them again.
Powers powers_for(const klear_logits& logits, const klear_coefficients& loss, const Row& row) {
    thread_local std::vector<float> scratch;
    if (!row.gradient || loss.entropy_coefficient != 0.0f) return {nullptr, nullptr};
    const int64_t blocks = logits.valid_columns / kCpuBlock + 1;
    const bool in_gradient = logits.gradient_type == KLEAR_F32;
    const size_t needed = static_cast<size_t>(blocks + (in_gradient ? 0 : logits.valid_columns));
    if (scratch.size() < needed) scratch.resize(needed);
    return {in_gradient ? reinterpret_cast<float*>(row.gradient) : scratch.data() + blocks, scratch.data()};
}

void fill_nan(char* gradient, int64_t columns, int64_t size) {
    const float nan = NAN;
    const uint16_t half = to_bf16(nan);
    const void* value = size == 4 ? static_cast<const void*>(&nan) : &half;
    for (int64_t j = 0; j < columns; ++j) memcpy(gradient + j * size, value, static_cast<size_t>(size));
}

void write_gradient(const CpuIsa& isa, const klear_logits& logits, const Row& row, const RowGradient& gradient,
                    Powers powers) {
    const int64_t size = size_of(logits.gradient_type);
    if (gradient.zero) {
        memset(row.gradient, 0, static_cast<size_t>(logits.columns * size));
        return;
    }
    if (gradient.target != gradient.target) {
        fill_nan(row.gradient, logits.valid_columns, size);  // the powers may have taken the place of the logits
    } else if (powers.row) {
        auto scale = size == 4 ? isa.scale_f32 : isa.scale_bf16;
        scale(powers.row, powers.maxima, row.gradient, logits.valid_columns, gradient);
    } else {
        auto sweep = logits.logits_type == KLEAR_BF16 ? isa.gradient_bf16_bf16
                     : size == 2                      ? isa.gradient_f32_bf16
                                                      : isa.gradient_f32_f32;
        sweep(row.logits, row.gradient, logits.valid_columns, row.scale, gradient);
    }
    memset(row.gradient + logits.valid_columns * size, 0,
           static_cast<size_t>((logits.columns - logits.valid_columns) * size));
    if (row.target < 0) return;
    const uint16_t half = to_bf16(gradient.at_target);
    const void* value = size == 4 ? static_cast<const void*>(&gradient.at_target) : &half;
    memcpy(row.gradient + row.target * size, value, static_cast<size_t>(size));
}

void write_skipped(const klear_logits& logits, const Row& row, const klear_outputs& out, int64_t index) {
    store_skipped(out, index);
    if (row.gradient) memset(row.gradient, 0, static_cast<size_t>(logits.columns * size_of(logits.gradient_type)));
}

template <class Body>
void for_each_row(const klear_logits& logits, int threads, const Body& body) {
    // short rows are handed out in bunches, so that handing out costs little
    const int bunch = static_cast<int>(1 + 16384 / (1 + logits.columns));
    (void)bunch;
    (void)threads;
#pragma omp parallel for schedule(dynamic, bunch) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < logits.rows; ++row) body(row);
}

}  // namespace
}  // namespace klear

using namespace klear;

const char* klear_cpu_isa(void) {
    const CpuIsa* isa = select_isa();
    return isa ? isa->name : nullptr;
}

const char* klear_error_string(int error) {
    switch (error) {
        case 0:
            return "no error";
        case KLEAR_BAD_ARGUMENT:
            return "shapes, types or strides that the row kernels do not take";
        case KLEAR_NO_ISA:
            return "KLEAR_CPU_ISA must be one of avx512, avx2 and scalar, and this CPU must have it";
        case KLEAR_NO_CUDA:
            return "the extension was built without its CUDA part: rebuild where nvcc is on the PATH";
        default:
            return klear_cuda_error_string(error);
    }
}

int klear_cpu_stats(const klear_logits* logits, const klear_tokens* tokens, float* stats, int threads) {
    const CpuIsa* isa = select_isa();
    if (!isa) return KLEAR_NO_ISA;
    if (!valid(*logits) || threads < 1) return KLEAR_BAD_ARGUMENT;
    for_each_row(*logits, threads, [&](int64_t i) {
        const bool skipped = row_skipped(*tokens, i);
        store_stats(stats, logits->rows, i,
                    skipped ? RowStats{0.0f, 1.0f, 0.0f, 0.0f} : stats_of(*isa, *logits, row_at(*logits, *tokens, i), {nullptr, nullptr}));
    });
    return 0;
}

int klear_cpu_combine(const float* stats, int64_t ranks, int64_t rows, float* combined) {
    if (ranks < 1 || rows < 0) return KLEAR_BAD_ARGUMENT;
    for (int64_t row = 0; row < rows; ++row) store_stats(combined, rows, row, merge_row(stats, ranks, rows, row));
    return 0;
}

int klear_cpu_finish(const klear_logits* logits, const klear_tokens* tokens, const klear_coefficients* loss,
                     const float* combined, const klear_outputs* out, int threads) {
    const CpuIsa* isa = select_isa();
    if (!isa) return KLEAR_NO_ISA;
    if (!valid(*logits) || threads < 1) return KLEAR_BAD_ARGUMENT;
    for_each_row(*logits, threads, [&](int64_t i) {
        const Row row = row_at(*logits, *tokens, i);
        if (row_skipped(*tokens, i)) return write_skipped(*logits, row, *out, i);
        const RowStats stats = load_stats(combined, logits->rows, i);
        const RowGradient gradient = finish_row(stats, *tokens, *loss, *out, i, true);
        if (row.gradient) write_gradient(*isa, *logits, row, gradient, {nullptr, nullptr});
    });
    return 0;
}

int klear_cpu_rows(const klear_logits* logits, const klear_tokens* tokens, const klear_coefficients* loss,
                   const klear_outputs* out, int threads) {
    const CpuIsa* isa = select_isa();
    if (!isa) return KLEAR_NO_ISA;
    if (!valid(*logits) || threads < 1) return KLEAR_BAD_ARGUMENT;
    for_each_row(*logits, threads, [&](int64_t i) {
        const Row row = row_at(*logits, *tokens, i);
        if (row_skipped(*tokens, i)) return write_skipped(*logits, row, *out, i);
        const Powers powers = powers_for(*logits, *loss, row);
        const RowStats stats = stats_of(*isa, *logits, row, powers);
        const RowGradient gradient = finish_row(stats, *tokens, *loss, *out, i, true);
        if (row.gradient) write_gradient(*isa, *logits, row, gradient, powers);
    });
    return 0;
}
