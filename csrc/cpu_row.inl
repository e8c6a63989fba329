// The sweeps over a row, written once over a vector of 16 floats. Included by each cpu_*.cpp after its `Vector`,
// inside its own namespace and under its own target attributes.
//
// A row is walked in blocks that stay in the first-level cache. Sums run in fp32 over a block, then in double: the order
// is fixed by the columns alone.

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = kCpuBlock;

KLEAR_INLINE Vector exp2_nonpositive(Vector x) {
    const float coefficients[] = {KLEAR_EXP2_COEFFICIENTS};
    const Vector whole = round(x);
    const Vector fraction = sub(x, whole);
    Vector power = splat(coefficients[0]);
    for (int i = 1; i < 7; ++i) power = fma(power, fraction, splat(coefficients[i]));
    return scale_by_power(power, whole);
}

template <class T>
struct Fill;
template <>
struct Fill<float> {
    static constexpr uint32_t value = 0xff800000u;  // -inf
};
template <>
struct Fill<uint16_t> {
    static constexpr uint16_t value = 0xff80u;
};

// The last, partial vector of a row: lanes past the end are -inf and weigh nothing.
template <class T>
KLEAR_INLINE Vector load_partial(const T* logits, int64_t count) {
    T lanes[kLanes];
    const auto fill = Fill<T>::value;
    for (int64_t i = 0; i < kLanes; ++i) __builtin_memcpy(lanes + i, &fill, sizeof(T));
    __builtin_memcpy(lanes, logits, static_cast<size_t>(count) * sizeof(T));
    return load(lanes);
}

template <class G>
KLEAR_INLINE void store_partial(G* gradient, Vector value, int64_t count) {
    G lanes[kLanes];
    store(lanes, value);
    __builtin_memcpy(gradient, lanes, static_cast<size_t>(count) * sizeof(G));
}

KLEAR_INLINE double sum_lanes(Vector value) {
    float lanes[kLanes];
    store(lanes, value);
    double sum = 0.0;
    for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
    return sum;
}

template <class T>
KLEAR_INLINE float block_max(const T* logits, int64_t columns) {
    Vector first = splat(kNoMax), second = first;
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
        first = max(load(logits + j), first);
        second = max(load(logits + j + kLanes), second);
    }
    for (; j + kLanes <= columns; j += kLanes) first = max(load(logits + j), first);
    if (j < columns) second = max(load_partial(logits + j, columns - j), second);
    float lanes[kLanes];
    store(lanes, max(first, second));
    float largest = kNoMax;
    for (int64_t i = 0; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

KLEAR_INLINE Vector accumulate(Vector logits, Vector scale, Vector shift, Vector& sum, Vector& spread) {
    // max keeps a NaN, which is its second operand
    const Vector exponent = max(splat(kMinExponent), fma(logits, scale, shift));
    const Vector power = exp2_nonpositive(exponent);
    sum = add(sum, power);
    spread = fma(power, exponent, spread);
    return power;
}

// One block against a maximum that bounds it; `powers` are kept where asked. The next block is fetched meanwhile.
template <class T, bool kKeep>
KLEAR_INLINE void block_sums(const T* logits, int64_t columns, float scale, float max, float* powers, double* sums) {
    const Vector scales = splat(scale), shift = splat(-max);
    Vector sum0 = splat(0.0f), sum1 = sum0, spread0 = sum0, spread1 = sum0;
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
        __builtin_prefetch(logits + j + kBlock);
        if (sizeof(T) == 4) __builtin_prefetch(logits + j + kBlock + kLanes);
        const Vector first = accumulate(load(logits + j), scales, shift, sum0, spread0);
        const Vector second = accumulate(load(logits + j + kLanes), scales, shift, sum1, spread1);
        if (kKeep) store(powers + j, first);
        if (kKeep) store(powers + j + kLanes, second);
    }
    for (; j + kLanes <= columns; j += kLanes) {
        const Vector power = accumulate(load(logits + j), scales, shift, sum0, spread0);
        if (kKeep) store(powers + j, power);
    }
    if (j < columns) {
        const Vector power = accumulate(load_partial(logits + j, columns - j), scales, shift, sum1, spread1);
        if (kKeep) store_partial(powers + j, power, columns - j);
    }
    sums[0] = sum_lanes(add(sum0, sum1));
    sums[1] = sum_lanes(add(spread0, spread1));
}

// Block by block against the largest logit so far; what was summed before is rescaled when a larger one turns up.
template <class T, bool kKeep>
KLEAR_INLINE void online_stats(const T* logits, int64_t columns, float scale, RowStats* stats, float* powers,
                               float* maxima) {
    float running = kNoMax;
    double sum = 0.0, spread = 0.0;
    for (int64_t start = 0; start < columns; start += kBlock) {
        const int64_t count = start + kBlock < columns ? kBlock : columns - start;
        const float largest = block_max(logits + start, count);
        const float scaled = largest * scale > kNoMax ? largest * scale : kNoMax;
        if (scaled > running) {
            const double shift = static_cast<double>(running) - scaled;
            const double factor = portable_exp2(static_cast<float>(shift));
            spread = sum == 0.0 ? 0.0 : (spread + sum * shift) * factor;
            sum *= factor;
            running = scaled;
        }
        double sums[2];
        block_sums<T, kKeep>(logits + start, count, scale, running, kKeep ? powers + start : nullptr, sums);
        if (kKeep) maxima[start / kBlock] = running;
        sum += sums[0];
        spread += sums[1];
    }
    stats->max = running;
    stats->sum = static_cast<float>(sum);
    stats->spread = static_cast<float>(spread);
}

template <class T>
void row_stats(const void* row, int64_t columns, float scale, RowStats* stats, float* powers, float* maxima) {
    const T* logits = static_cast<const T*>(row);
    if (powers)
        online_stats<T, true>(logits, columns, scale, stats, powers, maxima);
    else
        online_stats<T, false>(logits, columns, scale, stats, nullptr, nullptr);
}

// The gradient without an entropy term, from the powers that row_stats kept. No value is NaN.
template <class G>
void scale_powers(const float* powers, const float* maxima, void* row, int64_t columns, const RowGradient& gradient) {
    G* to = static_cast<G*>(row);
    for (int64_t start = 0; start < columns; start += kBlock) {
        const int64_t stop = start + kBlock < columns ? start + kBlock : columns;
        const Vector factor = splat(gradient.offset * portable_exp2(maxima[start / kBlock] - gradient.max));
        int64_t j = start;
        for (; j + 2 * kLanes <= stop; j += 2 * kLanes)
            store_numbers(to + j, mul(load(powers + j), factor), mul(load(powers + j + kLanes), factor));
        for (; j + kLanes <= stop; j += kLanes) store(to + j, mul(load(powers + j), factor));
        if (j < stop) store_partial(to + j, mul(load_partial(powers + j, stop - j), factor), stop - j);
    }
}

struct Coefficients {
    Vector scale, shift, slope, offset;
};

template <bool kEntropy>
KLEAR_INLINE Vector gradient_of(Vector logits, const Coefficients& row) {
    const Vector exponent = max(splat(kMinExponent), fma(logits, row.scale, row.shift));
    const Vector factor = kEntropy ? fma(row.slope, exponent, row.offset) : row.offset;
    return mul(exp2_nonpositive(exponent), factor);
}

// Reads a vector before it writes one, and never writes past what it has read: in place the gradient may be narrower.
template <class T, class G, bool kEntropy>
KLEAR_INLINE void gradient_sweep(const T* logits, G* gradient, int64_t columns, const Coefficients& row) {
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
        const Vector first = load(logits + j), second = load(logits + j + kLanes);
        store(gradient + j, gradient_of<kEntropy>(first, row));
        store(gradient + j + kLanes, gradient_of<kEntropy>(second, row));
    }
    for (; j + kLanes <= columns; j += kLanes) store(gradient + j, gradient_of<kEntropy>(load(logits + j), row));
    if (j < columns) {
        const Vector last = load_partial(logits + j, columns - j);
        store_partial(gradient + j, gradient_of<kEntropy>(last, row), columns - j);
    }
}

template <class T, class G>
void row_gradient(const void* logits, void* gradient, int64_t columns, float scale, const RowGradient& row) {
    const Coefficients vectors = {splat(scale), splat(-row.max), splat(row.slope), splat(row.offset)};
    const T* from = static_cast<const T*>(logits);
    G* to = static_cast<G*>(gradient);
    if (row.slope == 0.0f)
        gradient_sweep<T, G, false>(from, to, columns, vectors);
    else
        gradient_sweep<T, G, true>(from, to, columns, vectors);
}

// The sweeps in the order of CpuIsa.
#define KLEAR_CPU_SWEEPS(isa)                                                                             \
    isa::row_stats<float>, isa::row_stats<uint16_t>, isa::scale_powers<float>, isa::scale_powers<uint16_t>, \
        isa::row_gradient<float, float>, isa::row_gradient<float, uint16_t>, isa::row_gradient<uint16_t, uint16_t>
