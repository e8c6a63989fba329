// What the row kernels share: 16-byte units of a row, exponentials, and reductions in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "cuda_pairs.cuh"
#include "row_math.h"

namespace klear {

struct RowArguments {
    klear_logits logits;
    klear_tokens tokens;
    klear_coefficients loss;
    klear_outputs out;
    float* stats;  // [4, rows], in or out by phase
};

struct bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The larger of two, NaN if either is: a NaN logit must reach the sums.
__device__ __forceinline__ float max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {  // round to nearest even
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// 16 bytes of a row of logits.
template <class T>
struct Unit;

template <>
struct Unit<float> {
    static constexpr int kSize = 4;
    static constexpr uint32_t kEmpty = 0xff800000u;  // -inf
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&x)[kSize]) {
        x[0] = __uint_as_float(raw.x);
        x[1] = __uint_as_float(raw.y);
        x[2] = __uint_as_float(raw.z);
        x[3] = __uint_as_float(raw.w);
    }
    static __device__ __forceinline__ float load(const void* row, int64_t column) {
        return static_cast<const float*>(row)[column];
    }
};

template <>
struct Unit<bf16> {
    static constexpr int kSize = 8;
    static constexpr uint32_t kEmpty = 0xff80ff80u;
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&x)[kSize]) {
        const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = low_half(pairs[i]);
            x[2 * i + 1] = high_half(pairs[i]);
        }
    }
    static __device__ __forceinline__ float load(const void* row, int64_t column) {
        return low_half(static_cast<const uint16_t*>(row)[column]);
    }
};

template <class T>
__device__ __forceinline__ uint4 empty_unit() {
    constexpr uint32_t e = Unit<T>::kEmpty;
    return make_uint4(e, e, e, e);
}

// A unit that straddles the end of the valid columns, or lies past it: what is not valid becomes -inf.
template <class T>
__device__ __forceinline__ uint4 masked_unit(uint4 raw, int unit, int valid_columns) {
    const int left = valid_columns - unit * Unit<T>::kSize;
    if (left >= Unit<T>::kSize) return raw;
    uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    constexpr int kPerWord = Unit<T>::kSize / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (left <= i * kPerWord) {
            words[i] = Unit<T>::kEmpty;
        } else if (kPerWord == 2 && left == 2 * i + 1) {
            words[i] = (words[i] & 0xffffu) | (Unit<T>::kEmpty & 0xffff0000u);
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The gradient of one unit of logits: as wide as the unit, or half of it where fp32 is narrowed to bf16.
template <class T, class G>
__device__ __forceinline__ void store_unit(void* row, int unit, const float (&y)[Unit<T>::kSize]) {
    if constexpr (sizeof(G) == 4) {
        static_cast<uint4*>(row)[unit] = make_uint4(__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]),
                                                    __float_as_uint(y[3]));
    } else if constexpr (sizeof(T) == 4) {
        static_cast<uint2*>(row)[unit] = make_uint2(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]));
    } else {
        static_cast<uint4*>(row)[unit] = make_uint4(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]),
                                                    pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7]));
    }
}

template <class G>
__device__ __forceinline__ void store_column(void* row, int column, float value) {
    if constexpr (sizeof(G) == 4)
        static_cast<float*>(row)[column] = value;
    else
        static_cast<uint16_t*>(row)[column] = static_cast<uint16_t>(pack_bf16(value, 0.0f));
}

template <class T>
__device__ __forceinline__ float unit_max(const uint4& raw) {
    float x[Unit<T>::kSize];
    Unit<T>::unpack(raw, x);
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < Unit<T>::kSize; ++i) largest = fmaxf(largest, x[i]);
    return largest;
}

// The largest of two halves, each a maximum of its own.
__device__ __forceinline__ uint32_t max_pairs(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

template <>
__device__ __forceinline__ float unit_max<bf16>(const uint4& raw) {
    const uint32_t pair = max_pairs(max_pairs(raw.x, raw.y), max_pairs(raw.z, raw.w));
    return fmaxf(low_half(pair), high_half(pair));
}

// The largest of a thread's units.
template <class T>
struct Largest {
    float value = kNoMax;
    static __device__ __forceinline__ Largest of(const uint4& raw) { return {unit_max<T>(raw)}; }
    __device__ __forceinline__ void add(const uint4& raw) { value = fmaxf(value, unit_max<T>(raw)); }
    __device__ __forceinline__ float get() const { return value; }
};

#if KLEAR_PAIRS
template <>
struct Largest<bf16> {
    uint32_t pair = 0xcf00cf00u;  // kNoMax twice
    static __device__ __forceinline__ Largest of(const uint4& raw) {
        return {max_pairs(max_pairs(raw.x, raw.y), max_pairs(raw.z, raw.w))};
    }
    __device__ __forceinline__ void add(const uint4& raw) {
        pair = max_pairs(pair, max_pairs(max_pairs(raw.x, raw.y), max_pairs(raw.z, raw.w)));
    }
    __device__ __forceinline__ float get() const { return fmaxf(low_half(pair), high_half(pair)); }
};
#endif

__device__ __forceinline__ float scaled_max(float largest, float scale) {
    return largest * scale > kNoMax ? largest * scale : kNoMax;
}

// Sums over units of 2^a and 2^a * a, with a = logit * scale - max.
template <class T>
struct Sums {
    float sum, spread;
    __device__ __forceinline__ Sums(float sum, float spread) : sum(sum), spread(spread) {}
    template <bool kShared = false>
    __device__ __forceinline__ void add_unit(const uint4& raw, float scale, float max) {
        float x[Unit<T>::kSize];
        Unit<T>::unpack(raw, x);
#pragma unroll
        for (int i = 0; i < Unit<T>::kSize; ++i) {
            const float exponent = max_nan(fmaf(x[i], scale, -max), kMinExponent);
            const float power = exp2_approx(exponent);
            sum += power;
            spread = fmaf(power, exponent, spread);
        }
    }
    __device__ __forceinline__ float2 get() const { return {sum, spread}; }
};

#if KLEAR_PAIRS
// -inf made finite, two halves at a time: 0 * -2^84 is 0 where 0 * -inf would be NaN. At temperatures between 1e-13 and
// 1e15 what is left of it is finite and weighs nothing.
__device__ __forceinline__ uint32_t bounded_halves(uint32_t halves) {
    uint32_t y;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(halves), "r"(0xe980e980u));
    return y;
}

// Exponents and powers of two of a unit's pair `i`. With `kShared` the last of four pairs goes by the polynomial, its
// exponents bounded as such; those of the others are bounded as logits. Two reads are bound by the issue of
// instructions: there the special-function unit makes all.
template <bool kShared>
__device__ __forceinline__ Pair pair_powers(const uint4& raw, int i, float scale, float max, Pair& exponents) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    const bool polynomial = kShared && i == kPolynomialPair;
    const uint32_t halves = polynomial ? words[i] : bounded_halves(words[i]);
    float x = low_half(halves), y = high_half(halves);
    exponents = multiply_add(make_pair(x, y), make_pair(scale, scale), make_pair(-max, -max));
    take_apart(exponents, x, y);
    if (!polynomial) return make_pair(exp2_approx(x), exp2_approx(y));
    exponents = make_pair(max_nan(x, kMinPolynomial), max_nan(y, kMinPolynomial));
    return exp2_polynomial(exponents);
}

// Two of each sum, as pairs have it.
template <>
struct Sums<bf16> {
    Pair sum, spread;
    __device__ __forceinline__ Sums(float sum, float spread)
        : sum(make_pair(sum, 0.0f)), spread(make_pair(spread, 0.0f)) {}
    template <bool kShared = false>
    __device__ __forceinline__ void add_unit(const uint4& raw, float scale, float max) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Pair exponents;
            const Pair powers = pair_powers<kShared>(raw, i, scale, max, exponents);
            sum = add(sum, powers);
            spread = multiply_add(powers, exponents, spread);
        }
    }
    __device__ __forceinline__ float2 get() const {
        float a, b, c, d;
        take_apart(sum, a, b);
        take_apart(spread, c, d);
        return {a + b, c + d};
    }
};
#endif

// Where the row is, what it needs, and whose its target is.
template <class T>
struct RowPlace {
    const char* logits;
    char* gradient;
    int units;   // of 16 bytes, up to the next multiple of 8 columns
    int valid;   // columns
    int target;  // column, -1 where it is not in this shard
    int target_unit;
    float scale;
};

template <class T, class G>
__device__ __forceinline__ RowPlace<T> place_row(const RowArguments& a, int64_t row) {
    RowPlace<T> place;
    place.logits = static_cast<const char*>(a.logits.logits) + row * a.logits.logits_stride * (int64_t)sizeof(T);
    place.gradient = static_cast<char*>(a.logits.gradient) + row * a.logits.gradient_stride * (int64_t)sizeof(G);
    place.units = static_cast<int>((a.logits.columns + 7) / 8) * (8 / Unit<T>::kSize);
    place.valid = static_cast<int>(a.logits.valid_columns);
    const int64_t target = a.tokens.targets[row] - a.logits.vocab_start;
    place.target = target >= 0 && target < place.valid ? static_cast<int>(target) : -1;
    place.target_unit = place.target < 0 ? -1 : place.target / Unit<T>::kSize;
    place.scale = kLog2e / row_temperature(a.tokens, row);
    return place;
}

// A gradient that needs no logits: `value` in the valid columns of units [first, last), 0 behind them.
template <class T, class G>
__device__ __forceinline__ void fill_units(const RowPlace<T>& place, int first, int last, int threads, float value) {
    constexpr int kSize = Unit<T>::kSize;
    for (int unit = first + threadIdx.x; unit < last; unit += threads) {
        float y[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) y[i] = unit * kSize + i < place.valid ? value : 0.0f;
        store_unit<T, G>(place.gradient, unit, y);
    }
}

// A gradient that is one number: 0, or NaN in a row that means nothing.
__device__ __forceinline__ bool constant_gradient(const RowGradient& g) { return g.zero || g.target != g.target; }

template <class T, bool kShared>
__device__ __forceinline__ void unit_gradients(const uint4& raw, float scale, const RowGradient& g,
                                               float (&x)[Unit<T>::kSize]) {
#if KLEAR_PAIRS
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Pair exponents;
            const Pair powers = pair_powers<kShared>(raw, i, scale, g.max, exponents);
            const Pair factors = multiply_add(make_pair(g.slope, g.slope), exponents, make_pair(g.offset, g.offset));
            take_apart(multiply(powers, factors), x[2 * i], x[2 * i + 1]);
        }
        return;
    }
#endif
    Unit<T>::unpack(raw, x);
#pragma unroll
    for (int i = 0; i < Unit<T>::kSize; ++i) {
        const float exponent = max_nan(fmaf(x[i], scale, -g.max), kMinExponent);
        x[i] = exp2_approx(exponent) * fmaf(g.slope, exponent, g.offset);
    }
}

// gradient = 2^a * (slope * a + offset), and `at_target` at the target.
template <class T, class G, bool kShared = false>
__device__ __forceinline__ void gradient_unit(const uint4& raw, int unit, const RowPlace<T>& place,
                                              const RowGradient& g) {
    float x[Unit<T>::kSize];
    unit_gradients<T, kShared>(raw, place.scale, g, x);
    store_unit<T, G>(place.gradient, unit, x);
    if (unit == place.target_unit) store_column<G>(place.gradient, place.target, g.at_target);
}

cudaError_t launch_two_read(const RowArguments& arguments, int phase, cudaStream_t stream);
// cudaErrorNotSupported where the device or the code has no clusters, no cluster finds room, or the row does not fit in
// eight blocks' shared memory. Needs a gradient to write.
cudaError_t launch_one_read(const RowArguments& arguments, cudaStream_t stream);
// The same of a shard, for which its peers run too.
cudaError_t launch_sharded(const RowArguments& arguments, const klear_peers& peers, cudaStream_t stream);
cudaError_t sharded_fits(const klear_logits& logits);
int64_t post_bytes();  // of a rank's statistics of a row in a mailbox

enum Phase { kOnePass = 0, kStats = 1, kFinish = 2 };

}  // namespace klear
