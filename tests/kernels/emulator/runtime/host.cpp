// The host's side of the emulated device: launches, attributes, and what device.py calls.
#include <algorithm>

#include "device.h"

namespace emulated {

// --- what device code asks of its launch

uint3 thread_index() { return device.running->thread; }
uint3 block_index() { return device.running->block_index; }
bool planted(int number) { return device.planted == number; }

void launch_bounds(unsigned threads, unsigned) {
    if (device.running->block->cluster->grid->threads > threads)
        fatal("limit", "more threads a block than __launch_bounds__ of " + std::to_string(threads));
}

void* static_address(const void* key, const char* name, size_t bytes, size_t align) {
    char* shared = device.running->block->shared;
    Grid& grid = *device.running->block->cluster->grid;
    for (const Variable& v : grid.variables)
        if (v.key == key) return shared + v.offset;
    const size_t offset = (grid.static_bytes + align - 1) / align * align;
    grid.static_bytes = offset + bytes;
    if (grid.static_bytes > kStaticRoom) fatal("limit", "more static shared memory than the emulator has room for");
    grid.variables.push_back({key, name, static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes)});
    return shared + offset;
}

void* dynamic_address(size_t align) {
    Block& block = *device.running->block;
    block.cluster->grid->dynamic_offset = kStaticRoom + align;  // aligned as asked, and no better
    return block.shared + block.cluster->grid->dynamic_offset;
}

float exp2_of_the_device(float x) {
    if (x != x) return ptx::canonical_nan();
    constexpr float kSmallest = 1.17549435e-38f;
    if (fabsf(x) < kSmallest) return 1.0f;
    const double exact = exp2(static_cast<double>(x));
    const auto y = static_cast<float>(exact);
    if (y < kSmallest) return 0.0f;
    if (!device.exp2_error || y == INFINITY) return y;
    // as wrong as PTX allows, 2^-22 of the value: by the bits of x, always up, or always down
    const uint32_t bits = __float_as_uint(x) * 2654435761u;
    const double by_bits = static_cast<double>(bits >> 8) / (1 << 23) - 1.0;
    const double sign = device.exp2_error == 1 ? by_bits : device.exp2_error == 2 ? 1.0 : -1.0;
    return static_cast<float>(exact * (1.0 + sign * 0x1p-22));
}

// --- launches

static cudaError_t check(const Launch& launch, dim3 grid, dim3 block, size_t dynamic_bytes, unsigned cluster) {
    const auto limit = device.dynamic_limits.find(launch.kernel);
    const int most = std::max(49152, limit == device.dynamic_limits.end() ? 0 : limit->second);
    if (grid.x < 1 || grid.x > 2147483647u || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
    if (block.x < 1 || block.x > 1024 || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
    if (cluster > 1 && device.major < 9) return cudaErrorNotSupported;
    if (cluster > kMostCluster || (cluster & (cluster - 1)) || grid.x % cluster) return cudaErrorInvalidConfiguration;
    if (dynamic_bytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
    if (launch.argument_bytes > 4096) return cudaErrorInvalidValue;
    if (static_cast<int>(cluster) >= device.refused_cluster) return cudaErrorLaunchOutOfResources;
    return cudaSuccess;
}

cudaError_t run(const Launch& launch, dim3 grid, dim3 block, size_t dynamic_bytes, unsigned cluster) {
    const cudaError_t error = check(launch, grid, block, dynamic_bytes, cluster);
    if (error != cudaSuccess) return device.error = error;
    auto made = std::make_unique<Grid>();
    made->launch = launch;
    made->arguments.resize(launch.argument_bytes / sizeof(std::max_align_t) + 1);
    memcpy(made->arguments.data(), launch.arguments, launch.argument_bytes);
    made->launch.arguments = made->arguments.data();
    made->device = device.current;
    made->blocks = grid.x;
    made->threads = block.x;
    made->cluster = cluster;
    made->dynamic_bytes = dynamic_bytes;
    made->dynamic_offset = kStaticRoom + 128;
    device.queue.push_back(std::move(made));
    return device.together ? cudaSuccess : run_queued();
}

unsigned cluster_size(const cudaLaunchConfig_t& config) {
    unsigned size = 1;
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        const auto& dim = config.attrs[i].val.clusterDim;
        size = config.attrs[i].id == cudaLaunchAttributeClusterDimension && dim.y == 1 && dim.z == 1 ? dim.x : ~0u;
    }
    return size;
}

int occupancy(const cudaLaunchConfig_t& config, int* clusters) {
    const auto size = static_cast<int>(cluster_size(config));
    if (size < 1) return cudaErrorInvalidClusterSize;
    *clusters = size <= device.most_cluster ? 1 : 0;
    return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (value < 0 || value > device.optin) return device.error = cudaErrorInvalidValue;
    device.dynamic_limits[kernel] = value;
    return cudaSuccess;
}

}  // namespace emulated

using emulated::device;

// --- the runtime's calls

cudaError_t cudaGetDevice(int* number) {
    *number = device.current;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
    if (number < 0 || number >= device.count) return device.error = cudaErrorInvalidDevice;
    device.current = number;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = device.count;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? device.major : device.optin;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = device.error;
    device.error = cudaSuccess;
    return error;
}
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorNotSupported     ? "operation not supported"
           : error == cudaErrorIllegalAddress ? "an illegal memory access was encountered"
           : error == cudaErrorLaunchFailure  ? "unspecified launch failure"
                                              : "an error of the emulated device";
}

// --- what device.py calls

extern "C" {
// Forgets arrays, launches and faults.
void emulated_reset() {
    device.arrays.clear();
    device.readers.clear();
    device.faults.clear();
    device.seen_faults.clear();
    device.launches.clear();
    device.dynamic_limits.clear();
    device.error = cudaSuccess;
}

// A device of this compute capability, whose occupancy query has no room for clusters above `most_cluster` blocks and
// whose launches refuse those from `refused_cluster` on.
void emulated_properties(int major, int most_cluster, int refused_cluster) {
    device.major = major;
    device.most_cluster = most_cluster;
    device.refused_cluster = refused_cluster;
}

void emulated_schedule(int order, int copies, int preempt, int exp2_error, unsigned seed) {
    device.order = order;
    device.copies = copies;
    device.preempt = device.until_preempted = preempt;
    device.exp2_error = exp2_error;
    device.random.seed(seed);
}

// So many devices, of which each runs `resident` clusters at a time. Where `together`, launches wait for emulated_run.
void emulated_devices(int count, int resident, int together) {
    device.count = count;
    device.resident = resident;
    device.together = together != 0;
    device.current = 0;
    device.queue.clear();
}

int emulated_run() { return emulated::run_queued(); }

void emulated_plant(int number) { device.planted = number; }

// An array of a launch, [begin, begin + bytes), watched in granules of 2^shift bytes. Nothing of it may be touched but
// the windows that are opened; `holds` says whether it may be read before it is written.
void emulated_array(const char* name, uintptr_t begin, uint64_t bytes, int shift, int written, int holds, int complete) {
    emulated::Array array{name, begin, begin + bytes, shift, complete != 0, {}, {}, {}};
    if (written) array.cells.resize((bytes >> shift) + 1, {holds ? emulated::kByHost : 0, 0});
    device.arrays.push_back(std::move(array));
}

// The devices that alone may read and write the last array; -1 for any.
void emulated_owner(int reader, int writer) {
    device.arrays.back().reader = reader;
    device.arrays.back().writer = writer;
}

// Opens rows of the last array for reading or writing; those in `closed` [rows], where given, stay shut.
void emulated_window(uintptr_t begin, uint64_t pitch, uint64_t width, uint64_t rows, int write, const uint8_t* closed) {
    emulated::Window window{begin, pitch, width, rows, {}};
    if (closed) window.closed.assign(closed, closed + rows);
    (write ? device.arrays.back().write : device.arrays.back().read) = std::move(window);
}

// Reports the granules that had to be written and were not.
void emulated_check_complete() {
    for (const auto& array : device.arrays) {
        if (!array.complete) continue;
        uint64_t missing = 0;
        const auto& window = array.write;
        for (uint64_t row = 0; row < window.rows; ++row)
            for (uint64_t i = 0; i < window.width; i += uint64_t{1} << array.shift) {
                const auto& cell = array.cells[(window.begin + row * window.pitch + i - array.begin) >> array.shift];
                missing += emulated::run_of(cell.writer) < 2;
            }
        if (missing) emulated::fault("incomplete", std::to_string(missing) + " granules of " + array.name);
    }
}

// Of dynamic shared memory, over the kernels whose limit the last call set.
int emulated_smallest_limit() {
    int smallest = device.optin;
    for (const auto& entry : device.dynamic_limits) smallest = std::min(smallest, entry.second);
    return smallest;
}

int emulated_faults() { return static_cast<int>(device.faults.size()); }
const char* emulated_fault(int i) { return device.faults[static_cast<size_t>(i)].c_str(); }
int emulated_launches() { return static_cast<int>(device.launches.size()); }
const char* emulated_launch(int i) { return device.launches[static_cast<size_t>(i)].c_str(); }
}
