// Launches on one device or several: which cluster starts where, and what it knows of those before it.
#include <algorithm>

#include "device.h"

namespace emulated {

// A device may start the clusters of a launch in any order. Devices of odd number take the other way round.
static std::vector<unsigned> cluster_order(unsigned clusters, int number) {
    const bool backward = (device.order == kBackward) != (number % 2 == 1);
    std::vector<unsigned> order(clusters);
    for (unsigned i = 0; i < clusters; ++i) order[i] = backward ? clusters - 1 - i : i;
    if (device.order == kRandom) std::shuffle(order.begin(), order.end(), device.random);
    return order;
}

// Room for the clusters of every device that run at a time.
static void prepare_places() {
    device.clusters.clear();
    device.threads = 0;
    uint32_t places = 0;
    for (int number = 0; number < device.count; ++number) {
        size_t threads = 0, blocks = 0, clusters = 0;
        for (const auto& grid : device.queue) {
            if (grid->device != number) continue;
            threads = std::max<size_t>(threads, grid->threads * grid->cluster);
            blocks = std::max<size_t>(blocks, grid->cluster);
            clusters = std::max(clusters, grid->order.size());
        }
        for (size_t i = 0; i < std::min<size_t>(clusters, static_cast<size_t>(device.resident)); ++i) {
            auto cluster = std::make_unique<Cluster>();
            cluster->device = number;
            cluster->first_actor = static_cast<uint32_t>(device.threads);
            cluster->first_place = places;
            cluster->times.assign(threads, 1);
            device.threads += threads;
            places += static_cast<uint32_t>(blocks);
            device.clusters.push_back(std::move(cluster));
        }
    }
    if (places > kMostBlocks || clock_size() > 1 << 15)
        fatal("limit", "more threads at a time than the emulator has room for");
    device.idle_copies.clear();
    for (uint32_t i = kMostCopies; i-- > 0;) device.idle_copies.push_back(i);
    device.copy_times.assign(kMostCopies, 0);
}

static void start_block(Cluster& cluster, unsigned index, unsigned rank) {
    Grid& grid = *cluster.grid;
    auto& slot = cluster.blocks[rank];
    std::vector<Cell> words, units;  // their memory is kept
    if (slot) words.swap(slot->words), units.swap(slot->units);
    slot = std::make_unique<Block>();
    Block& block = *slot;
    block.cluster = &cluster;
    block.words.swap(words);
    block.units.swap(units);
    block.words.assign(kStaticRoom / 4, {});
    block.units.assign(grid.dynamic_bytes / 16 + 1, {});
    block.rank = rank;
    block.place = cluster.first_place + rank;
    block.shared = shared_windows() + block.place * kWindow;
    block.warps.resize((grid.threads + 31) / 32);
    memset(block.shared, 0xff, kStaticRoom + 1024 + grid.dynamic_bytes);  // NaN
    for (unsigned i = 0; i < grid.threads; ++i) {
        const unsigned number = rank * grid.threads + i;
        Fibre& fibre = cluster.fibres[number];
        fibre.thread = {i, 0, 0};
        fibre.block_index = {index * grid.cluster + rank, 0, 0};
        fibre.actor.id = cluster.first_actor + number;
        fibre.actor.time = fibre.actor.born = cluster.times[number] + 1;
        fibre.actor.device = grid.device;
        fibre.actor.seen = grid.before;
        fibre.block = &block;
        fibre.stack = stack_of(fibre.actor);
        fibre.top = fibre.stack + kStack - 64;
        block.threads.push_back(&fibre);
    }
}

static void start_cluster(Cluster& cluster, Grid& grid) {
    cluster.grid = &grid;
    cluster.phase = 0;
    cluster.arrived = cluster.ended = 0;
    cluster.arrivals = {};
    cluster.blocks.resize(grid.cluster);
    cluster.fibres.assign(grid.threads * grid.cluster, {});
    const unsigned index = grid.order[grid.started++];
    for (unsigned rank = 0; rank < grid.cluster; ++rank) start_block(cluster, index, rank);
    for (Fibre& fibre : cluster.fibres) start_thread(fibre);
}

// The launch of a device that is not over, none where all are.
static Grid* running_grid(int number) {
    Grid* before = nullptr;
    for (const auto& grid : device.queue) {
        if (grid->device != number) continue;
        if (grid->ended < grid->order.size()) {
            if (!grid->before)  // it has seen all that those before it did
                grid->before = before ? std::make_shared<const Clock>(before->after.clock)
                                      : std::make_shared<const Clock>(clock_size());
            return grid.get();
        }
        before = grid.get();
    }
    return nullptr;
}

void start_clusters() {
    for (const auto& cluster : device.clusters) {
        if (cluster->grid) continue;
        Grid* grid = running_grid(cluster->device);
        if (grid && grid->started < grid->order.size()) start_cluster(*cluster, *grid);
    }
}

bool all_ended() {
    for (const auto& grid : device.queue)
        if (grid->ended < grid->order.size()) return false;
    return true;
}

void end_cluster(Cluster& cluster) {
    Grid& grid = *cluster.grid;
    if (grid.after.clock.empty()) grid.after.clock = *grid.before;
    for (const auto& block : cluster.blocks)
        for (size_t i = 0; i < clock_size(); ++i)
            grid.after.clock[i] = std::max(grid.after.clock[i], block->ended.clock[i]);
    for (size_t i = 0; i < cluster.fibres.size(); ++i) cluster.times[i] = cluster.fibres[i].actor.time;
    const auto is_of_it = [&](const Copy& copy) { return copy.block->cluster == &cluster; };  // it has been reported
    device.copying.erase(std::remove_if(device.copying.begin(), device.copying.end(), is_of_it), device.copying.end());
    cluster.fibres.clear();
    cluster.grid = nullptr;
    ++grid.ended;
}

static void describe(const Grid& grid) {
    const size_t used = grid.dynamic_bytes + grid.static_bytes;
    if (used > static_cast<size_t>(device.optin))
        fault("limit", std::to_string(used) + " bytes of shared memory a block");
    const size_t room = (used + 1024 + 127) / 128 * 128;  // 1 KiB is the system's
    device.launches.push_back(at(grid.launch.site) + " grid=" + std::to_string(grid.blocks) + " block=" +
                              std::to_string(grid.threads) + " cluster=" + std::to_string(grid.cluster) + " dynamic=" +
                              std::to_string(grid.dynamic_bytes) + " static=" + std::to_string(grid.static_bytes) +
                              " resident=" + std::to_string(static_cast<size_t>(device.per_multiprocessor) / room));
}

cudaError_t run_queued() {
    ++device.serial;
    device.aborted = device.trapped = false;
    device.ready.clear();
    device.copying.clear();
    device.flags.clear();
    device.nanoseconds = 1;
    device.waited = 0;
    for (auto& grid : device.queue) grid->order = cluster_order(grid->blocks / grid->cluster, grid->device);
    prepare_places();
    run_fibres();
    for (const auto& grid : device.queue) describe(*grid);
    device.clusters.clear();
    device.queue.clear();
    if (!device.aborted) return cudaSuccess;  // an error of before stays until it is asked for
    return device.error = device.trapped ? cudaErrorLaunchFailure : cudaErrorIllegalAddress;
}

}  // namespace emulated
