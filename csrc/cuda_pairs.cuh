// Two fp32 numbers an instruction, and 2^x by them instead of the special-function unit: for sm_100 and its family,
// where exponentials and the issue of instructions take as long as memory for a row from bf16 to bf16. sm_120 has no such
// instructions (its compiler makes two of each), and memory takes ten times as long there.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

// Whether the sweeps of one read leave out the masks of whole units, and rows of bf16 go in pairs, in one read with one
// exponential in four by the polynomial. What other devices are compiled to stays as it is, and so do the bits of fp32
// rows, which memory bounds.
#ifndef KLEAR_PAIRS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
#define KLEAR_PAIRS 1
#else
#define KLEAR_PAIRS 0
#endif
#endif

namespace klear {

constexpr bool kPairs = KLEAR_PAIRS != 0;

#if KLEAR_PAIRS
struct Pair {
    uint64_t bits;  // the first number in the low half
};

__device__ __forceinline__ Pair make_pair(float x, float y) {
    Pair pair;
    asm("mov.b64 %0, {%1, %2};" : "=l"(pair.bits) : "f"(x), "f"(y));
    return pair;
}

__device__ __forceinline__ void take_apart(Pair pair, float& x, float& y) {
    asm("mov.b64 {%0, %1}, %2;" : "=f"(x), "=f"(y) : "l"(pair.bits));
}

__device__ __forceinline__ Pair add(Pair a, Pair b) {
    Pair y;
    asm("add.rn.f32x2 %0, %1, %2;" : "=l"(y.bits) : "l"(a.bits), "l"(b.bits));
    return y;
}

__device__ __forceinline__ Pair multiply(Pair a, Pair b) {
    Pair y;
    asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(y.bits) : "l"(a.bits), "l"(b.bits));
    return y;
}

__device__ __forceinline__ Pair multiply_add(Pair a, Pair b, Pair c) {
    Pair y;
    asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(y.bits) : "l"(a.bits), "l"(b.bits), "l"(c.bits));
    return y;
}

constexpr float kMinPolynomial = -127.0f;  // exponents below count as this one, to which the polynomial gives 0
constexpr int kPolynomialPair = 3;         // of the four of a unit

// Added to an exponent: the sum's last bits are the nearest whole number, 127 more, as an fp32 number keeps its own.
constexpr float kToWhole = 12583039.0f;  // 1.5 * 2^23 + 127

// 2^x for x in [-127, 127], 0 at -127, NaN for NaN: x = whole + f, a polynomial of f, 2^whole as bits (Cody and Waite).
// 2^whole is multiplied by, not added to the bits of the polynomial: that would make a finite number of a NaN.
__device__ __forceinline__ Pair exp2_polynomial(Pair x) {
    const Pair shifted = add(x, make_pair(kToWhole, kToWhole));
    const Pair whole = add(shifted, make_pair(-kToWhole, -kToWhole));
    const Pair fraction = multiply_add(whole, make_pair(-1.0f, -1.0f), x);
    // Minimax fit of 2^f on [-0.5, 0.5], degree 5: with the rounding of its steps the relative error of 2^x is less
    // than 1.6e-7, where ex2.approx may be off by 2^-22 = 2.4e-7.
    const float coefficients[] = {1.326472731e-03f, 9.671453387e-03f, 5.550723150e-02f,
                                  2.402224392e-01f, 6.931470037e-01f, 1.0f};
    Pair power = make_pair(coefficients[0], coefficients[0]);
#pragma unroll
    for (int i = 1; i < 6; ++i) power = multiply_add(power, fraction, make_pair(coefficients[i], coefficients[i]));
    float first, second;
    take_apart(shifted, first, second);
    return multiply(power, make_pair(__uint_as_float(__float_as_uint(first) << 23),
                                     __uint_as_float(__float_as_uint(second) << 23)));
}
#endif

}  // namespace klear
