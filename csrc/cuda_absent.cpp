// Stands in for the CUDA core in builds without nvcc.
#include "policy_loss.h"

int klear_cuda_rows(const klear_logits*, const klear_tokens*, const klear_coefficients*, const klear_outputs*, int,
                    int, void*) {
    return KLEAR_NO_CUDA;
}
int klear_cuda_stats(const klear_logits*, const klear_tokens*, float*, int, void*) { return KLEAR_NO_CUDA; }
int klear_cuda_combine(const float*, int64_t, int64_t, float*, int, void*) { return KLEAR_NO_CUDA; }
int klear_cuda_finish(const klear_logits*, const klear_tokens*, const klear_coefficients*, const float*,
                      const klear_outputs*, int, void*) {
    return KLEAR_NO_CUDA;
}
int klear_cuda_sharded_rows(const klear_logits*, const klear_tokens*, const klear_coefficients*, const klear_outputs*,
                            const klear_peers*, int, void*) {
    return KLEAR_NO_CUDA;
}
int klear_cuda_sharded_fits(const klear_logits*, int) { return KLEAR_NO_CUDA; }
int64_t klear_cuda_mailbox_bytes(int64_t, int64_t) { return 0; }
int klear_cuda_device_count(int* count) {
    *count = 0;
    return KLEAR_NO_CUDA;
}
const char* klear_cuda_archs(void) { return ""; }
const char* klear_cuda_error_string(int) { return "unknown error"; }
