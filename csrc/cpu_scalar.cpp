#include <stddef.h>

#include "cpu_isa.h"

#define KLEAR_INLINE static inline __attribute__((always_inline))

namespace klear {
namespace scalar {

struct Vector {
    float lane[16];
};

#define KLEAR_EACH_LANE(expression)                         \
    Vector result;                                          \
    for (int i = 0; i < 16; ++i) result.lane[i] = expression; \
    return result

KLEAR_INLINE float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

KLEAR_INLINE Vector splat(float x) { KLEAR_EACH_LANE(x); }
KLEAR_INLINE Vector load(const float* p) {
    Vector result;
    __builtin_memcpy(result.lane, p, sizeof result.lane);
    return result;
}
KLEAR_INLINE Vector load(const uint16_t* p) {
    uint16_t halves[16];
    __builtin_memcpy(halves, p, sizeof halves);
    KLEAR_EACH_LANE(from_bits(static_cast<uint32_t>(halves[i]) << 16));
}
KLEAR_INLINE void store(float* p, Vector x) { __builtin_memcpy(p, x.lane, sizeof x.lane); }
KLEAR_INLINE void store(uint16_t* p, Vector x) {  // round to nearest even
    uint16_t halves[16];
    for (int i = 0; i < 16; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, x.lane + i, sizeof bits);
        const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        halves[i] = static_cast<uint16_t>((x.lane[i] != x.lane[i] ? 0x7fc00000u : rounded) >> 16);
    }
    __builtin_memcpy(p, halves, sizeof halves);
}
template <class G>
KLEAR_INLINE void store_numbers(G* p, Vector first, Vector second) {
    store(p, first);
    store(p + 16, second);
}
// In double the product is exact, so that this rounds (almost) as a fused multiply-add does.
KLEAR_INLINE Vector fma(Vector a, Vector b, Vector c) {
    KLEAR_EACH_LANE(static_cast<float>(static_cast<double>(a.lane[i]) * b.lane[i] + c.lane[i]));
}
KLEAR_INLINE Vector add(Vector a, Vector b) { KLEAR_EACH_LANE(a.lane[i] + b.lane[i]); }
KLEAR_INLINE Vector sub(Vector a, Vector b) { KLEAR_EACH_LANE(a.lane[i] - b.lane[i]); }
KLEAR_INLINE Vector mul(Vector a, Vector b) { KLEAR_EACH_LANE(a.lane[i] * b.lane[i]); }
KLEAR_INLINE Vector max(Vector a, Vector b) { KLEAR_EACH_LANE(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
KLEAR_INLINE Vector round(Vector x) {  // to nearest even, for the small magnitudes of clamped exponents
    constexpr float kShift = 12582912.0f;
    KLEAR_EACH_LANE((x.lane[i] + kShift) - kShift);
}
// 2^power in two factors, as one would leave the range of normal numbers
KLEAR_INLINE Vector scale_by_power(Vector x, Vector power) {
    Vector result;
    for (int i = 0; i < 16; ++i) {
        // NaN lanes scale by 1 and stay NaN
        const int whole = power.lane[i] == power.lane[i] ? static_cast<int>(power.lane[i]) : 0;
        const int half = whole >> 1;
        const float first = from_bits(static_cast<uint32_t>(half + 127) << 23);
        result.lane[i] = x.lane[i] * first * from_bits(static_cast<uint32_t>(whole - half + 127) << 23);
    }
    return result;
}

#include "cpu_row.inl"

}  // namespace scalar

const CpuIsa kScalarIsa = {"scalar", KLEAR_CPU_SWEEPS(scalar)};

}  // namespace klear
