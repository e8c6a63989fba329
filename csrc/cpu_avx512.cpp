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
KLEAR_INLINE void store(uint16_t* p, Vector x) {  // round to nearest even
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i safe = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16)));
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
