// What each instruction set provides to the CPU twin: the sweeps over a row.
#pragma once

#include <stdint.h>

#include "row_math.h"

namespace klear {

constexpr int64_t kCpuBlock = 4096;

struct CpuIsa {
    const char* name;
    // Statistics of `columns` logits; `scale` is log2 e / temperature. The target field is left to the caller. Where
    // `powers` [columns] is not null it receives 2^(y - maxima[block]); it may be the fp32 logits themselves.
    void (*stats_f32)(const void* logits, int64_t columns, float scale, RowStats* stats, float* powers, float* maxima);
    void (*stats_bf16)(const void* logits, int64_t columns, float scale, RowStats* stats, float* powers, float* maxima);
    // gradient[j] of `columns` logits from the powers, the target's own term left out; fp32 may be in place.
    void (*scale_f32)(const float* powers, const float* maxima, void* gradient, int64_t columns,
                      const RowGradient& row);
    void (*scale_bf16)(const float* powers, const float* maxima, void* gradient, int64_t columns,
                       const RowGradient& row);
    // The same from the logits; may be in place.
    void (*gradient_f32_f32)(const void* logits, void* gradient, int64_t columns, float scale, const RowGradient& row);
    void (*gradient_f32_bf16)(const void* logits, void* gradient, int64_t columns, float scale, const RowGradient& row);
    void (*gradient_bf16_bf16)(const void* logits, void* gradient, int64_t columns, float scale,
                               const RowGradient& row);
};

extern const CpuIsa kScalarIsa;
#ifdef __x86_64__
extern const CpuIsa kAvx2Isa;
extern const CpuIsa kAvx512Isa;
#endif

}  // namespace klear
