// The scalar part of a row: merging statistics and turning them into outputs and gradient coefficients.
// Compiled by the host compiler and by nvcc alike, so that the CPU twin and the CUDA core are one formula.
#pragma once

#include <math.h>
#include <stdint.h>

#include "policy_loss.h"

#ifdef __CUDACC__
#define KLEAR_HD __host__ __device__ __forceinline__
#else
#define KLEAR_HD inline
#endif

namespace klear {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kMaxLogRatio = 20.0f;
constexpr float kMaxKl = 10.0f;
// The maximum of no columns at all, and what logits below it count as. Finite, so that differences of maxima never are
// inf - inf; and not below -2^31, since a maximum is rounded by up to 2^-24 of itself and 2 to that must stay finite.
constexpr float kNoMax = -2147483648.0f;
// Exponents are clamped here: 2^-200 is 0 in fp32, and 0 * -200 is 0 where 0 * -inf would be NaN.
constexpr float kMinExponent = -200.0f;

// Minimax fit of 2^f on [-0.5, 0.5], degree 6, largest relative error 2e-9.
#define KLEAR_EXP2_COEFFICIENTS \
    1.533757697e-04f, 1.339986036e-03f, 9.618519534e-03f, 5.550328998e-02f, 2.402264661e-01f, 6.931472056e-01f, 1.0f

struct RowStats {
    float max;     // log2 domain
    float sum;     // of 2^(y - max)
    float spread;  // of 2^(y - max) * (y - max)
    float target;  // y[target] - max, +inf where the target is not in the shard
};

// What the gradient sweep needs: gradient[j] = 2^a * (slope * a + offset) with a = logit * scale - max,
// and `target` more at the target.
struct RowGradient {
    float max;
    float slope;
    float offset;
    float target;
    float at_target;  // the whole gradient there
    bool zero;        // the gradient is 0 everywhere
};

KLEAR_HD float row_temperature(const klear_tokens& tokens, int64_t row) {
    return tokens.temperatures ? tokens.temperatures[row] : tokens.temperature;
}

// Rows of weight 0 are left out; without any weights there is nothing to leave out.
KLEAR_HD bool row_skipped(const klear_tokens& tokens, int64_t row) {
    if (!tokens.policy_weights && !tokens.nll_weights) return false;
    return (!tokens.policy_weights || tokens.policy_weights[row] == 0.0f) &&
           (!tokens.nll_weights || tokens.nll_weights[row] == 0.0f);
}

// 2^x for x <= 0 by correctly rounded operations only: the same bits on every device.
KLEAR_HD float portable_exp2(float x) {
    if (!(x >= -125.0f)) return x < -125.0f ? 0.0f : x;  // a NaN is no number to be cast below
    const float coefficients[] = {KLEAR_EXP2_COEFFICIENTS};
    const float whole = rintf(x);
    const float fraction = x - whole;
    float power = coefficients[0];
    for (int i = 1; i < 7; ++i) power = fmaf(power, fraction, coefficients[i]);
    return ldexpf(power, static_cast<int>(whole));
}

// stats is [ranks, 4, rows]; the ranks are merged in their order.
KLEAR_HD RowStats merge_row(const float* stats, int64_t ranks, int64_t rows, int64_t row) {
    RowStats merged = {kNoMax, 0.0f, 0.0f, INFINITY};
    for (int64_t rank = 0; rank < ranks; ++rank) {
        const float max = stats[(4 * rank) * rows + row];
        if (max > merged.max) merged.max = max;
    }
    for (int64_t rank = 0; rank < ranks; ++rank) {
        const float* shard = stats + 4 * rank * rows + row;
        const float shift = shard[0] - merged.max;
        const float factor = portable_exp2(shift);
        merged.sum = fmaf(shard[rows], factor, merged.sum);
        merged.spread = fmaf(fmaf(shard[rows], shift, shard[2 * rows]), factor, merged.spread);
        if (shard[3 * rows] != INFINITY) merged.target = shard[3 * rows] + shift;
    }
    return merged;
}

KLEAR_HD RowStats load_stats(const float* stats, int64_t rows, int64_t row) {
    return {stats[row], stats[rows + row], stats[2 * rows + row], stats[3 * rows + row]};
}

KLEAR_HD void store_stats(float* stats, int64_t rows, int64_t row, const RowStats& value) {
    stats[row] = value.max;
    stats[rows + row] = value.sum;
    stats[2 * rows + row] = value.spread;
    stats[3 * rows + row] = value.target;
}

// exp of a difference of log-probs, bounded so that it stays finite. Two equal log-probs, -inf included, give 1.
KLEAR_HD float bounded_difference(float a, float b) {
    const float difference = a == b ? 0.0f : a - b;
    if (difference > kMaxLogRatio) return kMaxLogRatio;
    return difference < -kMaxLogRatio ? -kMaxLogRatio : difference;
}

// Divergence of the old policy from the present one, each seen as "this token or another" (DPPO's binary forms).
// 1 - p comes from expm1, since p itself rounds to 1.
KLEAR_HD float binary_divergence(const klear_coefficients& loss, float logprob, float old) {
    const float difference = expf(logprob) - expf(old);
    if (loss.kind == KLEAR_DPPO_TV) return difference < 0.0f ? -difference : difference;
    const float old_rest = -expm1f(old), rest = -expm1f(logprob);
    const float here = expf(old) == 0.0f ? 0.0f : expf(old) * (old - logprob);
    return here + (old_rest > 0.0f ? old_rest * (logf(old_rest) - logf(rest)) : 0.0f);
}

KLEAR_HD int clip_region(const klear_coefficients& loss, float advantage, float ratio, float logprob, float old) {
    if (loss.kind == KLEAR_NLL || loss.kind == KLEAR_REINFORCE || loss.kind == KLEAR_SAPO) return KLEAR_UNCLIPPED;
    const bool negative = advantage < 0.0f;
    if (loss.kind == KLEAR_DPPO_TV || loss.kind == KLEAR_DPPO_KL) {
        if (negative ? !(logprob < old) : !(logprob > old)) return KLEAR_UNCLIPPED;
        if (!(binary_divergence(loss, logprob, old) > (negative ? loss.beta_low : loss.beta_high)))
            return KLEAR_UNCLIPPED;
        return negative ? KLEAR_LOW_NEGATIVE : KLEAR_HIGH_POSITIVE;
    }
    if (negative && ratio > loss.dual_clip && loss.kind != KLEAR_CISPO) return KLEAR_DUAL_CLIP;
    if (ratio < loss.ratio_low) return negative ? KLEAR_LOW_NEGATIVE : KLEAR_LOW_POSITIVE;
    if (ratio > loss.ratio_high) return negative ? KLEAR_HIGH_NEGATIVE : KLEAR_HIGH_POSITIVE;
    return KLEAR_UNCLIPPED;
}

struct PolicyTerm {
    float value;
    float derivative;  // with respect to the log-prob
};

KLEAR_HD PolicyTerm policy_term(const klear_coefficients& loss, float advantage, float ratio, float logprob,
                                int region) {
    const float plain = -advantage * ratio;
    switch (loss.kind) {
        case KLEAR_NLL:
            return {-logprob, -1.0f};
        case KLEAR_REINFORCE:
            // -inf * 0 has no meaning as a loss
            return {advantage == 0.0f ? 0.0f : -advantage * logprob, -advantage};
        case KLEAR_CISPO: {
            const float low = ratio < loss.ratio_low ? loss.ratio_low : ratio;
            const float weight = -advantage * (low > loss.ratio_high ? loss.ratio_high : low);
            return {weight == 0.0f ? 0.0f : weight * logprob, weight};
        }
        case KLEAR_SAPO: {
            const float tau = advantage > 0.0f ? loss.beta_high : loss.beta_low;
            const float x = tau * (ratio - 1.0f);
            const float tail = expf(x > 0.0f ? -x : x), gate = (x > 0.0f ? 1.0f : tail) / (1.0f + tail);
            return {-advantage * 4.0f * gate / tau, 4.0f * plain * tail / ((1.0f + tail) * (1.0f + tail))};
        }
        case KLEAR_DPPO_TV:
        case KLEAR_DPPO_KL: {
            if (region != KLEAR_UNCLIPPED) return {0.0f, 0.0f};
            const float weight = -advantage * (ratio > loss.ratio_high ? loss.ratio_high : ratio);
            return {weight, weight};
        }
        default:
            break;
    }
    if (region == KLEAR_DUAL_CLIP) return {-advantage * loss.dual_clip, 0.0f};
    const bool low = region == KLEAR_LOW_NEGATIVE;
    if (!low && region != KLEAR_HIGH_POSITIVE) return {plain, plain};
    const float bounded = -advantage * (low ? loss.ratio_low : loss.ratio_high);
    if (loss.kind == KLEAR_PPO) return {bounded, 0.0f};
    const float kept = bounded * (low ? loss.beta_low : loss.beta_high);
    return {kept, kept};
}

// An estimate of the KL divergence to the reference. k3 grows as the exponential of the difference: without a bound one
// outlier outweighs the batch.
KLEAR_HD PolicyTerm kl_term(int estimator, float reference, float logprob, float ratio) {
    const float difference = bounded_difference(reference, logprob);
    const float weight = estimator == KLEAR_K3_WEIGHTED ? ratio : 1.0f;
    const float value =
        weight * (estimator == KLEAR_K2 ? 0.5f * difference * difference : expm1f(difference) - difference);
    if (value > kMaxKl) return {kMaxKl, 0.0f};
    if (difference >= kMaxLogRatio || difference <= -kMaxLogRatio) return {value, 0.0f};
    return {value, -weight * (estimator == KLEAR_K3 ? expm1f(difference) : difference)};
}

template <class T>
KLEAR_HD void store_if(T* pointer, int64_t row, T value) {
    if (pointer) pointer[row] = value;
}

KLEAR_HD void store_skipped(const klear_outputs& out, int64_t row) {
    store_if(out.logprobs, row, 0.0f);
    store_if(out.entropy, row, 0.0f);
    store_if(out.lse, row, 0.0f);
    store_if(out.ratio, row, 0.0f);
    store_if(out.loss, row, 0.0f);
    store_if(out.region, row, uint8_t{0});
    store_if(out.status, row, uint8_t{0});
}

// Turns a row's statistics into its outputs (written when `write`) and the coefficients of its gradient.
KLEAR_HD RowGradient finish_row(const RowStats& stats, const klear_tokens& tokens, const klear_coefficients& loss,
                                const klear_outputs& out, int64_t row, bool write) {
    int status = 0;
    if (!(stats.sum > 0.0f && stats.sum < INFINITY)) status |= KLEAR_NOT_FINITE;
    if (stats.target == INFINITY) status |= KLEAR_TARGET_ABSENT;
    if (stats.target == -INFINITY && !status) status |= KLEAR_TARGET_MASKED;
    const bool broken = (status & (KLEAR_NOT_FINITE | KLEAR_TARGET_ABSENT)) != 0;

    const float log2_sum = log2f(stats.sum);
    const float logprob = broken ? NAN : (stats.target - log2_sum) * kLn2;
    const float mean_spread = stats.spread / stats.sum;
    const float entropy = (log2_sum - mean_spread) * kLn2;

    const float policy_weight = tokens.policy_weights ? tokens.policy_weights[row] : 0.0f;
    const float nll_weight = tokens.nll_weights ? tokens.nll_weights[row] : 0.0f;
    const float advantage = tokens.advantages ? tokens.advantages[row] : 0.0f;
    const float old = tokens.old_logprobs ? tokens.old_logprobs[row] : logprob;
    const float ratio = expf(bounded_difference(logprob, old));
    const int region = clip_region(loss, advantage, ratio, logprob, old);

    float value = 0.0f, derivative = 0.0f;
    if (policy_weight != 0.0f) {
        const PolicyTerm term = policy_term(loss, advantage, ratio, logprob, region);
        value = policy_weight * term.value;
        derivative = policy_weight * term.derivative;
        if (tokens.ref_logprobs && loss.kl_coefficient != 0.0f) {
            const PolicyTerm kl = kl_term(loss.kl_estimator, tokens.ref_logprobs[row], logprob, ratio);
            const float kl_weight = policy_weight * loss.kl_coefficient;
            value += kl_weight * kl.value;
            derivative += kl_weight * kl.derivative;
        }
        if (loss.entropy_coefficient != 0.0f) value -= policy_weight * loss.entropy_coefficient * entropy;
    }
    if (nll_weight != 0.0f) {
        value -= nll_weight * logprob;
        derivative -= nll_weight;
    }
    if (write) {
        store_if(out.logprobs, row, logprob);
        store_if(out.entropy, row, entropy);
        store_if(out.lse, row, (stats.max + log2_sum) * kLn2);
        store_if(out.ratio, row, ratio);
        store_if(out.loss, row, broken ? NAN : value);
        store_if(out.region, row, static_cast<uint8_t>(region));
        store_if(out.status, row, static_cast<uint8_t>(status));
    }

    const float inverse_temperature = 1.0f / row_temperature(tokens, row);
    const float target = broken ? NAN : derivative * inverse_temperature;
    const float bonus = loss.entropy_coefficient * policy_weight * inverse_temperature * kLn2;
    RowGradient gradient;
    gradient.max = stats.max;
    gradient.slope = bonus / stats.sum;
    gradient.offset = -(bonus * mean_spread + target) / stats.sum;
    gradient.target = target;
    const float exponent = stats.target < kMinExponent ? kMinExponent : stats.target;
    gradient.at_target = exp2f(exponent) * (gradient.slope * exponent + gradient.offset) + target;
    gradient.zero = target == 0.0f && bonus == 0.0f;
    return gradient;
}

}  // namespace klear
