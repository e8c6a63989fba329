#ifdef __x86_64__
#include <immintrin.h>
#include <stddef.h>

#include "cpu_isa.h"

#define KLEAR_INLINE static inline __attribute__((always_inline))
#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace klear {
namespace avx2 {

struct Vector {
    __m256 low, high;
};

KLEAR_INLINE Vector splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
KLEAR_INLINE Vector load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KLEAR_INLINE __m256 widen(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
KLEAR_INLINE Vector load(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
KLEAR_INLINE void store(float* p, Vector x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
KLEAR_INLINE __m256i narrow(__m256 x) {  // round to nearest even, result in the low half of each 32 bits
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
KLEAR_INLINE void store(uint16_t* p, Vector x) {
    const __m256i packed = _mm256_packus_epi32(narrow(x.low), narrow(x.high));  // interleaved by 128-bit halves
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
template <class G>
KLEAR_INLINE void store_numbers(G* p, Vector first, Vector second) {
    store(p, first);
    store(p + 16, second);
}
KLEAR_INLINE Vector fma(Vector a, Vector b, Vector c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
KLEAR_INLINE Vector add(Vector a, Vector b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
KLEAR_INLINE Vector sub(Vector a, Vector b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
KLEAR_INLINE Vector mul(Vector a, Vector b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
KLEAR_INLINE Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
KLEAR_INLINE Vector round(Vector x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}
// 2^power in two factors, as one would leave the range of normal numbers
KLEAR_INLINE __m256 scale_by_power(__m256 x, __m256 power) {
    const __m256i whole = _mm256_cvtps_epi32(power);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
KLEAR_INLINE Vector scale_by_power(Vector x, Vector power) {
    return {scale_by_power(x.low, power.low), scale_by_power(x.high, power.high)};
}

#include "cpu_row.inl"

}  // namespace avx2

const CpuIsa kAvx2Isa = {"avx2", KLEAR_CPU_SWEEPS(avx2)};

}  // namespace klear
#pragma GCC pop_options
#endif
