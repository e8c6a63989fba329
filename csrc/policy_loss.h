// Row kernels of the fused policy loss: from a chunk of logits to per-token losses and d loss / d logits.
//
// The interface is plain C, so that neither torch nor pybind11 is seen by nvcc, and the CPU twin and the CUDA core take
// the very same structs. Every pointer of a call lives on one device. Every function returns 0 or an error code that
// klear_error_string() turns into words; nothing is written after an error of the arguments.
//
// What a row computes. With x the row's valid columns divided by the temperature, p = softmax(x), H its entropy,
// logp = log p[target], w the policy weight, n the NLL weight:
//
//     loss = w * policy(logp) - n * logp + kl_coefficient * w * kl(logp) - entropy_coefficient * w * H
//     d loss / d logits[j] = (g * (1[j = target] - p[j]) + entropy_coefficient * w * p[j] * (log p[j] + H)) / temperature
//
// where g = d loss / d logp. With A the advantage and r = exp(clamp(logp - old, -20, 20)):
//
//     kind        value                        d value / d logp
//     NLL         -logp                        -1
//     REINFORCE   -A * logp                    -A
//     PPO         max(-A r, -A clip(r))        -A r, 0 in regions 1 and 2
//     GPPO        -A r                         the value itself; in region 1 both are -A beta_low ratio_low,
//                                              in region 2 both are -A beta_high ratio_high
//     CISPO       -A clip(r) * logp            -A clip(r)
//     SAPO        -A 4 sigma(x) / tau          -4 A r sigma(x) (1 - sigma(x)), x = tau (r - 1)
//     DPPO        -A min(r, ratio_high)        the value itself; in regions 1 and 2 both are 0
//
// PPO and GPPO past the dual clip (region 5): value -A dual_clip, derivative 0. beta_low and beta_high are the constants
// of tokens of negative and of other advantage: SAPO's tau, and DPPO's bound of the divergence of old and present
// probability mu and p of the target, |p - mu| or mu log(mu / p) + (1 - mu) log((1 - mu) / (1 - p)). DPPO is in region
// 1 where A < 0, p < mu and in region 2 where A >= 0, p > mu, past that bound. Without old_logprobs the step is
// on-policy and r is 1. The clamp of the ratio bounds values and never zeroes a derivative: dr/dlogp is r everywhere.
//
// The KL term. With d = ref - logp and k3 = exp(d) - d - 1:
//
//     K3            k3            1 - exp(d)
//     K2            d * d / 2     -d
//     K3_UNBIASED   k3            -d
//     K3_WEIGHTED   r * k3        -r d
//
// A value above 10 is 10 with derivative 0, and past |d| = 20 the derivative is 0.
//
// Extremes. A logit of -inf has probability 0 and gradient 0. Rows whose policy and NLL weights are both 0 are never
// read: their gradient and all their outputs are 0. A NaN or +inf logit, or a row without a finite logit, gives NaN
// outputs and status 4. A target outside the valid vocabulary gives NaN and status 1; a target of logit -inf gives
// logprob -inf, a finite gradient and status 2. Logits / temperature below -2^31 ln 2 count as -inf; above 2^31 ln 2 they
// are too large for fp32 and may give status 4. Where the outputs are NaN so is the gradient, in the valid columns.
//
// Determinism. A row's result depends on that row alone: not on the threads, the chunk it came in or its address.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum klear_type { KLEAR_F32 = 0, KLEAR_BF16 = 1 };

enum klear_kind {
    KLEAR_NLL = 0,
    KLEAR_REINFORCE = 1,
    KLEAR_PPO = 2,
    KLEAR_GPPO = 3,
    KLEAR_CISPO = 4,
    KLEAR_SAPO = 5,
    KLEAR_DPPO_TV = 6,
    KLEAR_DPPO_KL = 7
};

enum klear_kl { KLEAR_K3 = 0, KLEAR_K2 = 1, KLEAR_K3_UNBIASED = 2, KLEAR_K3_WEIGHTED = 3 };

enum klear_region {
    KLEAR_UNCLIPPED = 0,
    KLEAR_LOW_NEGATIVE = 1,   // A < 0,  r < ratio_low; DPPO: masked
    KLEAR_HIGH_POSITIVE = 2,  // A >= 0, r > ratio_high; DPPO: masked
    KLEAR_LOW_POSITIVE = 3,   // A >= 0, r < ratio_low
    KLEAR_HIGH_NEGATIVE = 4,  // A < 0,  r > ratio_high, not past the dual clip
    KLEAR_DUAL_CLIP = 5       // A < 0,  r > dual_clip (PPO and GPPO)
};

enum klear_status { KLEAR_TARGET_ABSENT = 1, KLEAR_TARGET_MASKED = 2, KLEAR_NOT_FINITE = 4 };

enum klear_error {
    KLEAR_BAD_ARGUMENT = -1,
    KLEAR_NO_ISA = -2,   // KLEAR_CPU_ISA names an instruction set this CPU lacks, or none at all
    KLEAR_NO_CUDA = -3   // built without the CUDA part
    // positive codes are cudaError_t
};

// A chunk of logits and where its gradient goes.
//
// The gradient may be the logits' own memory (same address, same row stride in bytes), in which case it may also be the
// narrower type: row i of the bf16 gradient then fills the first half of row i of the fp32 logits. Otherwise the two
// must not overlap. Allowed pairs: fp32 -> fp32, fp32 -> bf16, bf16 -> bf16.
// On CUDA rows start at multiples of 16 bytes, and the columns up to the next multiple of 8 belong to the row: they
// are written with zeros in the gradient.
typedef struct {
    const void* logits;
    void* gradient;           // null: forward only
    int64_t logits_stride;    // elements between rows
    int64_t gradient_stride;  // elements between rows
    int64_t rows;
    int64_t columns;        // of this vocabulary shard, padding included
    int64_t valid_columns;  // columns [valid_columns, columns) are padding: never read, gradient 0
    int64_t vocab_start;    // vocabulary id of column 0
    int32_t logits_type;    // klear_type
    int32_t gradient_type;  // klear_type
} klear_logits;

// Per-token inputs, each [rows]; those marked ? may be null.
typedef struct {
    const int64_t* targets;       // vocabulary ids
    const float* policy_weights;  // ? with nll_weights also null every row counts, with weight 0 (forward only)
    const float* nll_weights;     // ?
    const float* old_logprobs;    // ? r is 1
    const float* advantages;      // ? for NLL
    const float* ref_logprobs;    // ? no KL term
    const float* temperatures;    // ? `temperature` for all
    float temperature;
} klear_tokens;

// The loss: bounds are absolute ratios, dual_clip is infinite where there is none.
typedef struct {
    int32_t kind;  // klear_kind
    float ratio_low;
    float ratio_high;
    float beta_low;
    float beta_high;
    float dual_clip;
    float entropy_coefficient;
    float kl_coefficient;
    int32_t kl_estimator;  // klear_kl
} klear_coefficients;

// Per-token outputs, each [rows]; any may be null.
typedef struct {
    float* logprobs;
    float* entropy;
    float* lse;  // log-sum-exp of logits / temperature
    float* ratio;
    float* loss;  // weighted: the chunk's loss is the plain sum
    uint8_t* region;
    uint8_t* status;
} klear_outputs;

// Statistics of a row over one vocabulary shard, laid out [4, rows], in the log2 domain (y2 = logit / temperature *
// log2 e): max of y2, sum of 2^(y2 - max), sum of 2^(y2 - max) * (y2 - max), and y2[target] - max, which is +inf on
// the shards that do not hold the target.

// One pass, the whole vocabulary on this device: outputs and, where `gradient` is set, the gradient.
int klear_cpu_rows(const klear_logits*, const klear_tokens*, const klear_coefficients*, const klear_outputs*,
                   int threads);
// Statistics of this shard.
int klear_cpu_stats(const klear_logits*, const klear_tokens*, float* stats, int threads);
// Merge [ranks, 4, rows] into [4, rows], in the order of the ranks; bitwise the same on the CPU and on CUDA.
int klear_cpu_combine(const float* stats, int64_t ranks, int64_t rows, float* combined);
// Outputs and, where `gradient` is set, this shard's gradient, from the merged statistics.
int klear_cpu_finish(const klear_logits*, const klear_tokens*, const klear_coefficients*, const float* combined,
                     const klear_outputs*, int threads);
// The instruction set the next call will use ("avx512", "avx2", "scalar"), null when KLEAR_CPU_ISA cannot be had.
const char* klear_cpu_isa(void);

// The same on a CUDA device, which is made current, ordered on `stream` (a cudaStream_t); nothing synchronises.
// KLEAR_AUTO takes one read where there is a gradient to write and the device can, else two. KLEAR_ONE_READ gives an
// error where the device cannot; without a gradient it takes two as well.
enum klear_row_kernel { KLEAR_AUTO = 0, KLEAR_TWO_READ = 1, KLEAR_ONE_READ = 2 };
int klear_cuda_rows(const klear_logits*, const klear_tokens*, const klear_coefficients*, const klear_outputs*,
                    int row_kernel, int device, void* stream);
int klear_cuda_stats(const klear_logits*, const klear_tokens*, float* stats, int device, void* stream);
int klear_cuda_combine(const float* stats, int64_t ranks, int64_t rows, float* combined, int device,
                       void* stream);
int klear_cuda_finish(const klear_logits*, const klear_tokens*, const klear_coefficients*, const float* combined,
                      const klear_outputs*, int device, void* stream);

// One pass over a sharded vocabulary that reads this shard's logits once. All ranks make the same calls in the same order,
// with the same rows and generation; the kernels meet through mailboxes and wait for each other on the devices
// (cuda_sharded.cu says why they cannot stand still). Not to be captured in a CUDA graph: a generation is used once.
enum { KLEAR_MOST_RANKS = 16 };
typedef struct {
    const int64_t* mailboxes;  // on the host, [ranks]: addresses of the ranks' mailboxes as this device reaches them
    uint32_t* ticket;          // on this device, 0 before the first call
    int64_t capacity;          // rows that fit in a mailbox
    int64_t timeout_ns;        // how long a row waits for a peer before the kernel traps
    int64_t generation;        // 1 at the first call with these mailboxes, one more at each that follows
    int32_t ranks;
    int32_t rank;
} klear_peers;
int klear_cuda_sharded_rows(const klear_logits*, const klear_tokens*, const klear_coefficients*, const klear_outputs*,
                            const klear_peers*, int device, void* stream);
// 0 where the device can run it for rows of this width and these types. Every rank must be able to before any starts.
int klear_cuda_sharded_fits(const klear_logits*, int device);
// Of a mailbox, which holds zeros before the first call; at a multiple of 32.
int64_t klear_cuda_mailbox_bytes(int64_t ranks, int64_t capacity);
int klear_cuda_device_count(int* count);
const char* klear_cuda_archs(void);  // what the CUDA part was compiled for, "" without one
const char* klear_cuda_error_string(int error);

const char* klear_error_string(int error);

#ifdef __cplusplus
}
#endif
