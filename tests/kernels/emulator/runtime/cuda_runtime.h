// Stands in for CUDA's header when translated device code is compiled by g++ (see translate.py): the types, calls and
// device functions that csrc/ uses. What they do is in host.cpp, threads.cpp and barriers.cpp.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

namespace emulated {

// Where a call stands in the source.
struct Site {
    const char* file;
    int line;
};
#define EMULATED_SITE ::emulated::Site site = {__builtin_FILE(), __builtin_LINE()}

}  // namespace emulated

// --- types

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorInvalidClusterSize = 912
};
typedef struct CUstream_st* cudaStream_t;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaFuncAttributes {
    int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
    char pad[64];
    struct {
        unsigned x, y, z;
    } clusterDim;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

// --- calls of the host

namespace emulated {

struct Launch {
    const void* kernel;
    void (*thread)(const Launch&);  // what each thread runs
    void* arguments;
    size_t argument_bytes;
    Site site;
};
cudaError_t run(const Launch&, dim3 grid, dim3 block, size_t dynamic_bytes, unsigned cluster);
unsigned cluster_size(const cudaLaunchConfig_t&);

template <class... Expected>
void call_kernel(const Launch& launch) {
    std::apply(reinterpret_cast<void (*)(Expected...)>(const_cast<void*>(launch.kernel)),
               *static_cast<std::tuple<std::decay_t<Expected>...>*>(launch.arguments));
}

template <class... Expected, class... Actual>
cudaError_t launch(Site site, void (*kernel)(Expected...), dim3 grid, dim3 block, size_t bytes, unsigned cluster,
                   Actual&&... actual) {
    using Arguments = std::tuple<std::decay_t<Expected>...>;
    static_assert((std::is_trivially_copyable_v<std::decay_t<Expected>> && ...), "a launch keeps a copy of their bytes");
    Arguments arguments(std::forward<Actual>(actual)...);
    return run({reinterpret_cast<const void*>(kernel), &call_kernel<Expected...>, &arguments, sizeof arguments, site},
               grid, block, bytes, cluster);
}

// kernel<<<grid, block, bytes, stream>>>(...): its error is left to cudaGetLastError.
template <class... Expected, class... Actual>
void chevrons(Site site, void (*kernel)(Expected...), dim3 grid, dim3 block, size_t bytes, cudaStream_t,
              Actual&&... actual) {
    launch(site, kernel, grid, block, bytes, 1, std::forward<Actual>(actual)...);
}

// A launch configuration and where it was used.
struct ConfigAt {
    const cudaLaunchConfig_t& config;
    Site site;
    ConfigAt(const cudaLaunchConfig_t* c, EMULATED_SITE) : config(*c), site(site) {}
};

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value);
int compiled_for(int architecture);

}  // namespace emulated

cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);

template <class... T>
cudaError_t cudaFuncSetAttribute(void (*kernel)(T...), cudaFuncAttribute attribute, int value) {
    return emulated::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
#ifdef __CUDA_ARCH__
template <class... T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(T...)) {
    attributes->ptxVersion = __CUDA_ARCH__ / 10;
    return cudaSuccess;
}
#endif
template <class... T>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(T...), const cudaLaunchConfig_t* config);

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(emulated::ConfigAt at, void (*kernel)(Expected...), Actual&&... actual) {
    return emulated::launch(at.site, kernel, at.config.gridDim, at.config.blockDim, at.config.dynamicSmemBytes,
                            emulated::cluster_size(at.config), std::forward<Actual>(actual)...);
}

// --- device code

namespace emulated {

uint3 thread_index();
uint3 block_index();
void launch_bounds(unsigned threads, unsigned blocks = 0);
void* static_address(const void* key, const char* name, size_t bytes, size_t align);
void* dynamic_address(size_t align);
template <class T>
T& static_shared(const void* key, const char* name, size_t align) {
    return *static_cast<T*>(static_address(key, name, sizeof(T), align));
}
template <class T>
T* dynamic_shared(size_t align) {
    return static_cast<T*>(dynamic_address(align));
}
bool planted(int number);  // whether a fault of the tests is to be committed

enum WarpOperation { kXor, kDown, kSync };
uint32_t warp_exchange(WarpOperation, uint32_t mask, uint32_t value, uint32_t operand, Site);
int occupancy(const cudaLaunchConfig_t&, int* clusters);

template <class T>
T shuffle(WarpOperation operation, uint32_t mask, T value, uint32_t operand, Site site) {
    static_assert(sizeof(T) == 4, "four bytes a lane");
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    bits = warp_exchange(operation, mask, bits, operand, site);
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

}  // namespace emulated

template <class... T>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(T...), const cudaLaunchConfig_t* config) {
    return static_cast<cudaError_t>(emulated::occupancy(*config, clusters));
}

#define threadIdx (::emulated::thread_index())
#define blockIdx (::emulated::block_index())

void __syncthreads(EMULATED_SITE);
unsigned atomicInc(unsigned* address, unsigned last, EMULATED_SITE);
size_t __cvta_generic_to_shared(const void*);
inline void __syncwarp(uint32_t mask = ~0u, EMULATED_SITE) {
    emulated::warp_exchange(emulated::kSync, mask, 0, 0, site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, EMULATED_SITE) {
    return emulated::shuffle(emulated::kXor, mask, value, static_cast<uint32_t>(lanes), site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, EMULATED_SITE) {
    return emulated::shuffle(emulated::kDown, mask, value, delta, site);
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

#include "ptx.h"
