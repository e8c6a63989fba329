#ifdef __x86_64__
#include <immintrin.h>
#include <stddef.h>

#include "cpu_isa.h"

#define KLEAR_INLINE static inline __attribute__((always_inline))
// GCC's own intrinsics initialise a variable with itself
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

namespace klear {
namespace avx512 {

typedef __m512 Vector;

KLEAR_INLINE Vector splat(float x) { return _mm512_set1_ps(x); }
KLEAR_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
KLEAR_INLINE Vector load(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
KLEAR_INLINE void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
KLEAR_INLINE __m512i round_number(Vector x) {  // to nearest even, result in the high half of each 32 bits
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
}
KLEAR_INLINE void store(uint16_t* p, Vector x) {
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i safe = _mm512_mask_mov_epi32(round_number(x), nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16)));
}
// Two vectors without NaN: the high halves of both, gathered by one permutation.
KLEAR_INLINE void store_numbers(uint16_t* p, Vector first, Vector second) {
    alignas(64) static const uint16_t kHighHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                         33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i order = _mm512_load_si512(kHighHalves);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(round_number(first), order, round_number(second)));
}
KLEAR_INLINE void store_numbers(float* p, Vector first, Vector second) {
    store(p, first);
    store(p + 16, second);
}
KLEAR_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
KLEAR_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
KLEAR_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
KLEAR_INLINE Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
KLEAR_INLINE Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
KLEAR_INLINE Vector round(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KLEAR_INLINE Vector scale_by_power(Vector x, Vector power) { return _mm512_scalef_ps(x, power); }

#include "cpu_row.inl"

}  // namespace avx512

const CpuIsa kAvx512Isa = {"avx512", KLEAR_CPU_SWEEPS(avx512)};

}  // namespace klear
#pragma GCC pop_options
#endif
