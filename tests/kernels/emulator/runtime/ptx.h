// The PTX instructions of csrc/, each a function named by its mnemonic with "." as "_" and "::" as "__" (translate.py
// makes the calls). An operand in brackets arrives as its 32-bit shared or 64-bit global address. An instruction that is
// not here does not compile: none is ever skipped.
#pragma once

namespace emulated {

float exp2_of_the_device(float);
uint32_t cluster_rank();
void mbarrier_init(uint32_t address, uint32_t count, Site);
void mbarrier_arrive_expect(uint32_t address, uint32_t bytes, Site);
bool mbarrier_try_wait(uint32_t address, uint32_t parity, Site);
void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Site);
void fence_async();
uint32_t map_to_peer(uint32_t address, uint32_t rank, Site);
void store_to_peer(uint32_t address, uint32_t bits, Site);
void cluster_arrive(bool releases, Site);
void cluster_wait(Site);
uint32_t load_from_peer(uint32_t address, Site);
uint64_t nanoseconds();
[[noreturn]] void trap();
enum Scope { kDevice, kSystem };
void strong_store(uint32_t* to, uint32_t value, bool releases, Scope, Site);
uint32_t strong_load(const uint32_t* from, bool acquires, Scope, Site);

namespace ptx {

struct Sink {};  // the operand "_"

inline bool is_nan(float x) { return x != x; }
inline float canonical_nan() { return __uint_as_float(0x7fffffffu); }

// --- arithmetic

inline void ex2_approx_ftz_f32(float& y, float x) { y = exp2_of_the_device(x); }

inline void max_NaN_f32(float& y, float a, float b) {
    const bool b_is_minus_zero = a == b && __float_as_uint(a) >> 31;
    y = is_nan(a) || is_nan(b) ? canonical_nan() : a > b || (a == b && !b_is_minus_zero) ? a : b;
}

inline uint32_t round_to_bf16(float x) {  // to nearest even
    const uint32_t bits = __float_as_uint(x);
    return is_nan(x) ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline void cvt_rn_bf16x2_f32(uint32_t& pair, float high, float low) {
    pair = round_to_bf16(high) << 16 | round_to_bf16(low);
}

inline uint32_t larger_half(uint32_t a, uint32_t b) {  // the number where one is NaN
    const float x = __uint_as_float(a << 16), y = __uint_as_float(b << 16);
    if (is_nan(x) && is_nan(y)) return 0x7fffu;
    return is_nan(y) || x > y || (x == y && b >> 15) ? a : b;
}
inline void max_bf16x2(uint32_t& y, uint32_t a, uint32_t b) {
    y = larger_half(a >> 16, b >> 16) << 16 | larger_half(a & 0xffffu, b & 0xffffu);
}

inline uint32_t larger_half_or_nan(uint32_t a, uint32_t b) {
    const bool either = is_nan(__uint_as_float(a << 16)) || is_nan(__uint_as_float(b << 16));
    return either ? 0x7fffu : larger_half(a, b);
}
inline void max_NaN_bf16x2(uint32_t& y, uint32_t a, uint32_t b) {
    y = larger_half_or_nan(a >> 16, b >> 16) << 16 | larger_half_or_nan(a & 0xffffu, b & 0xffffu);
}

// --- pairs of fp32

inline void mov_b64(uint64_t& pair, float low, float high) {
    pair = static_cast<uint64_t>(__float_as_uint(high)) << 32 | __float_as_uint(low);
}
inline void mov_b64(float& low, float& high, uint64_t pair) {
    low = __uint_as_float(static_cast<uint32_t>(pair));
    high = __uint_as_float(static_cast<uint32_t>(pair >> 32));
}
template <class Each>
void each_of_pair(uint64_t& y, uint64_t a, uint64_t b, uint64_t c, Each each) {
    float parts[3][2];
    mov_b64(parts[0][0], parts[0][1], a);
    mov_b64(parts[1][0], parts[1][1], b);
    mov_b64(parts[2][0], parts[2][1], c);
    float results[2];
    for (int i = 0; i < 2; ++i) {
        const float result = each(parts[0][i], parts[1][i], parts[2][i]);
        results[i] = is_nan(result) ? canonical_nan() : result;
    }
    mov_b64(y, results[0], results[1]);
}
inline void add_rn_f32x2(uint64_t& y, uint64_t a, uint64_t b) {
    each_of_pair(y, a, b, 0, [](float u, float v, float) { return u + v; });
}
inline void mul_rn_f32x2(uint64_t& y, uint64_t a, uint64_t b) {
    each_of_pair(y, a, b, 0, [](float u, float v, float) { return u * v; });
}
inline void fma_rn_f32x2(uint64_t& y, uint64_t a, uint64_t b, uint64_t c) {
    each_of_pair(y, a, b, c, [](float u, float v, float w) { return fmaf(u, v, w); });
}

// --- data and barriers

inline uint32_t special_cluster_ctarank() { return cluster_rank(); }
inline void mov_u32(uint32_t& to, uint32_t from) { to = from; }

inline void mbarrier_init_shared__cta_b64(uint32_t address, uint32_t count, EMULATED_SITE) {
    mbarrier_init(address, count, site);
}
inline void mbarrier_arrive_expect_tx_shared__cta_b64(Sink, uint32_t address, uint32_t bytes, EMULATED_SITE) {
    mbarrier_arrive_expect(address, bytes, site);
}
inline void mbarrier_try_wait_parity_shared__cta_b64(bool& done, uint32_t address, uint32_t parity, EMULATED_SITE) {
    done = mbarrier_try_wait(address, parity, site);
}
inline void cp_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(uint32_t to, const void* from,
                                                                              uint32_t bytes, uint32_t barrier,
                                                                              EMULATED_SITE) {
    bulk_copy(to, from, bytes, barrier, site);
}
inline void fence_proxy_async_shared__cta() { fence_async(); }
inline void fence_mbarrier_init_release_cluster() {}  // no barrier here is used by a peer

inline void mapa_shared__cluster_u32(uint32_t& to, uint32_t address, uint32_t rank, EMULATED_SITE) {
    to = map_to_peer(address, rank, site);
}
inline void st_shared__cluster_f32(uint32_t address, float value, EMULATED_SITE) {
    store_to_peer(address, __float_as_uint(value), site);
}
inline void ld_shared__cluster_u32(uint32_t& value, uint32_t address, EMULATED_SITE) {
    value = load_from_peer(address, site);
}
inline void barrier_cluster_arrive_release_aligned(EMULATED_SITE) { cluster_arrive(true, site); }
inline void barrier_cluster_arrive_relaxed_aligned(EMULATED_SITE) { cluster_arrive(false, site); }
inline void barrier_cluster_wait_acquire_aligned(EMULATED_SITE) { cluster_wait(site); }


// --- other devices

inline void st_release_sys_global_u32(uint32_t* to, uint32_t value, EMULATED_SITE) {
    strong_store(to, value, true, kSystem, site);
}
inline void st_release_gpu_global_u32(uint32_t* to, uint32_t value, EMULATED_SITE) {
    strong_store(to, value, true, kDevice, site);
}
inline void st_relaxed_sys_global_u32(uint32_t* to, uint32_t value, EMULATED_SITE) {
    strong_store(to, value, false, kSystem, site);
}
inline void ld_acquire_sys_global_u32(uint32_t& value, const uint32_t* from, EMULATED_SITE) {
    value = strong_load(from, true, kSystem, site);
}
inline void ld_acquire_gpu_global_u32(uint32_t& value, const uint32_t* from, EMULATED_SITE) {
    value = strong_load(from, true, kDevice, site);
}
inline void ld_relaxed_sys_global_u32(uint32_t& value, const uint32_t* from, EMULATED_SITE) {
    value = strong_load(from, false, kSystem, site);
}
[[noreturn]] inline void trap() { ::emulated::trap(); }
inline uint64_t special_globaltimer() { return nanoseconds(); }
inline void mov_u64(uint64_t& to, uint64_t from) { to = from; }

}  // namespace ptx
}  // namespace emulated
