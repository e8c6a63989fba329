// What each instruction set provides to the CPU twin: the two sweeps over a row.
#pragma once

#include <stdint.h>

#include "row_math.h"

namespace klear {

struct CpuIsa {
    const char* name;
    // Statistics of `columns` logits; `scale` is log2 e / temperature. The target field is left to the caller.
    void (*stats_f32)(const void* logits, int64_t columns, float scale, RowStats* stats);
    void (*stats_bf16)(const void* logits, int64_t columns, float scale, RowStats* stats);
    // gradient[j] of `columns` logits, the target's own term left out; may be in place.
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
