// What threads wait for: warp operations, barriers of blocks and clusters, mbarriers and bulk copies; stores to peers.
#include "device.h"

namespace emulated {

// --- warps and blocks

Warp& warp_of(const Fibre& fibre) { return fibre.block->warps[fibre.thread.x / 32]; }

// What all lanes of a warp must do together, and in the same order.
static void collective(const char* what, Site site) {
    Fibre& fibre = *device.running;
    auto& done = warp_of(fibre).collectives;
    if (fibre.collectives == done.size()) done.push_back(site);
    const Site expected = done[fibre.collectives++];
    if (expected.line != site.line || strcmp(expected.file, site.file))
        fatal("divergence",
              who(fibre.actor) + " is at " + what + ", another lane of its warp went to " + at(expected) + ",", site);
}

void open_block_barrier(Block& block) {
    const Site first = block.at_barrier[0]->site;
    if (block.done)
        fault("divergence", "__syncthreads at " + at(first) + " without " + std::to_string(block.done) +
                                " threads that have ended");
    for (const Fibre* f : block.at_barrier)
        if (f->site.line != first.line)
            fault("divergence", "__syncthreads at " + at(f->site) + " meets the one at " + at(first));
    meet(block.at_barrier);
    for (Fibre* f : block.at_barrier) wake(*f);
    block.at_barrier.clear();
}

static uint32_t source_lane(WarpOperation operation, uint32_t lane, uint32_t operand) {
    const uint32_t source = operation == kXor ? lane ^ operand : operation == kDown ? lane + operand : lane;
    return source < 32 ? source : lane;
}

uint32_t warp_exchange(WarpOperation operation, uint32_t mask, uint32_t value, uint32_t operand, Site site) {
    Fibre& fibre = *device.running;
    const uint32_t lane = fibre.thread.x % 32;
    if (mask == ~0u) collective("a warp operation", site);
    Warp& warp = warp_of(fibre);
    if (!(mask >> lane & 1)) fatal("divergence", who(fibre.actor) + " is not in the mask of its warp operation", site);
    if (warp.here && (warp.operation != operation || warp.mask != mask || warp.site.line != site.line))
        fatal("divergence", who(fibre.actor) + " meets another warp operation, " + at(warp.site) + ",", site);
    warp.operation = operation;
    warp.mask = mask;
    warp.site = site;
    warp.here |= 1u << lane;
    warp.values[lane] = value;
    warp.operands[lane] = operand;
    if (warp.here != mask) {
        suspend(Wait::kWarp, site);
        return fibre.operand;
    }
    warp.here = 0;
    std::vector<Fibre*> lanes;
    const size_t first = fibre.thread.x / 32 * 32;
    for (uint32_t i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        const uint32_t source = source_lane(operation, i, warp.operands[i]);
        if (!(mask >> source & 1)) fatal("divergence", "a shuffle reads a lane outside its mask", site);
        Fibre* f = fibre.block->threads[first + i];
        f->operand = warp.values[source];
        lanes.push_back(f);
        if (f != &fibre) wake(*f);
    }
    if (operation == kSync) meet(lanes);  // shuffles order no memory
    return fibre.operand;
}

// --- mbarriers and bulk copies

// A shared address holds in its top byte 0 for the own block, else the rank of a peer plus 1.
static std::pair<Block*, uint32_t> decode(uint32_t address, Site site) {
    const uint32_t rank = address >> 24, offset = (address & 0xffffff) - kFirstAddress;
    Fibre& fibre = *device.running;
    auto& blocks = fibre.block->cluster->blocks;
    if (rank > blocks.size() || offset >= kWindow)
        fatal("out of bounds", "shared address " + std::to_string(address) + " of " + who(fibre.actor), site);
    return {rank ? blocks[rank - 1].get() : fibre.block, offset};
}

static Mbarrier& mbarrier_at(uint32_t address, Site site) {
    const auto [block, offset] = decode(address, site);
    const auto found = block->mbarriers.find(offset);
    const std::string user = who(device.running->actor);
    if (found == block->mbarriers.end()) fatal("mbarrier", "used before it is initialised, by " + user, site);
    if (!ordered(found->second.init, device.running->actor))
        fault("race", user + " uses an mbarrier whose initialisation it cannot see, " + at(site));
    return found->second;
}

void mbarrier_init(uint32_t address, uint32_t count, Site site) {
    const auto [block, offset] = decode(address, site);
    const Actor& actor = device.running->actor;
    if (offset % 8) fatal("alignment", "an mbarrier at an address that is no multiple of 8", site);
    if (block->mbarriers.count(offset)) fatal("mbarrier", "initialised twice", site);
    access_shared(actor, *block, offset, 8, true, nullptr);
    Mbarrier& barrier = block->mbarriers[offset];
    barrier.count = barrier.pending = count;
    barrier.init = now(actor);
    barrier.arrivals.clock.resize(clock_size());
}

void fence_async() {
    for (auto& entry : device.running->block->mbarriers)
        if (ordered(entry.second.init, device.running->actor)) entry.second.fenced = true;
}

// Completes the phase when all have arrived and all bytes are there.
static void settle(Block& block, uint32_t offset) {
    Mbarrier& barrier = block.mbarriers.at(offset);
    if (barrier.bytes > 1048575 || barrier.bytes < -1048575)
        fault("mbarrier", "its count of bytes leaves the 20 bits that it has");
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.count;
    ++barrier.phase;
    barrier.completed = std::make_shared<const Clock>(barrier.arrivals.clock);
    for (Fibre* f : block.threads)
        if (f->wait == Wait::kMbarrier && f->operand == offset) wake(*f);
}

void mbarrier_arrive_expect(uint32_t address, uint32_t bytes, Site site) {
    Mbarrier& barrier = mbarrier_at(address, site);
    const auto [block, offset] = decode(address, site);
    publish(device.running->actor, barrier.arrivals);
    if (!barrier.pending) fatal("mbarrier", "more arrivals than it was initialised for", site);
    barrier.bytes += bytes;
    --barrier.pending;
    settle(*block, offset);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity, Site site) {
    Fibre& fibre = *device.running;
    Mbarrier& barrier = mbarrier_at(address, site);
    if ((barrier.phase & 1) == parity) {  // the phase of that parity is the running one
        fibre.operand = decode(address, site).second;
        suspend(Wait::kMbarrier, site);
        return false;
    }
    if (barrier.phase) acquire(fibre.actor, barrier.completed);
    return true;
}

void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier_address, Site site) {
    Fibre& fibre = *device.running;
    Mbarrier& barrier = mbarrier_at(barrier_address, site);
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || !bytes)
        fatal("alignment", "a bulk copy whose addresses or size are no multiples of 16", site);
    if (!barrier.fenced)
        fault("async proxy", "a bulk copy completes on an mbarrier whose initialisation was not fenced, " + at(site));
    if (device.idle_copies.empty()) fatal("limit", "more bulk copies than the emulator has clocks for", site);
    const auto [block, offset] = decode(to, site);
    Copy copy;
    const uint32_t number = device.idle_copies.back();
    device.idle_copies.pop_back();
    copy.actor.id = static_cast<uint32_t>(device.threads) + number;
    copy.actor.time = copy.actor.born = ++device.copy_times[number];
    copy.actor.device = fibre.actor.device;
    Published start;
    publish(fibre.actor, start);
    copy.actor.seen = std::make_shared<const Clock>(std::move(start.clock));
    copy.block = block;
    copy.to = offset;
    copy.bytes = bytes;
    copy.barrier = decode(barrier_address, site).second;
    copy.from = static_cast<const char*>(from);
    copy.site = site;
    device.copying.push_back(copy);
    if (device.copies == kAtOnce) finish_copy(device.copying.size() - 1);
}

void finish_copy(size_t index) {
    Copy copy = device.copying[index];
    device.copying.erase(device.copying.begin() + static_cast<int64_t>(index));
    Block& block = *copy.block;
    if (block.done == block.threads.size())
        return fault("lifetime", "a bulk copy writes shared memory of a block that has ended, " + at(copy.site));
    for (uint32_t i = 0; i < copy.bytes; i += 16) {
        access_global(copy.actor, reinterpret_cast<uintptr_t>(copy.from) + i, 16, false, nullptr);
        access_shared(copy.actor, block, copy.to + i, 16, true, nullptr);
        memcpy(block.shared + copy.to + i, copy.from + i, 16);
    }
    Mbarrier& barrier = block.mbarriers.at(copy.barrier);
    publish(copy.actor, barrier.arrivals);
    const uint32_t number = copy.actor.id - static_cast<uint32_t>(device.threads);
    device.copy_times[number] = copy.actor.time;
    device.idle_copies.push_back(number);
    barrier.bytes -= copy.bytes;
    settle(block, copy.barrier);
}

// --- clusters

uint32_t cluster_rank() { return device.running->block->rank; }

uint32_t map_to_peer(uint32_t address, uint32_t rank, Site site) {
    if (rank >= device.running->block->cluster->blocks.size()) fatal("cluster", "mapa of a block that the cluster does not have", site);
    if (address >> 24) fatal("cluster", "mapa of an address that is mapped already", site);
    return (rank + 1) << 24 | address;
}

static void check_peer_is_alive(Block& peer, Site site) {
    const Fibre& fibre = *device.running;
    bool started = fibre.met;
    for (const Fibre* f : peer.threads) started |= (*fibre.actor.seen)[f->actor.id] > 0;
    if (!started)
        fault("lifetime", who(fibre.actor) + " reaches shared memory of a block that may not have started, " +
                              at(site));
    if (peer.done == peer.threads.size())
        fatal("lifetime", who(fibre.actor) + " reaches shared memory of a block that has ended", site);
    peer.by_peers.push_back(now(fibre.actor));
}

void store_to_peer(uint32_t address, uint32_t bits, Site site) {
    const auto [block, offset] = decode(address, site);
    if (offset % 4) fatal("alignment", "a store to a peer that is not aligned", site);
    if (block != device.running->block) check_peer_is_alive(*block, site);
    access_shared(device.running->actor, *block, offset, 4, true, nullptr);
    memcpy(block->shared + offset, &bits, 4);
}

uint32_t load_from_peer(uint32_t address, Site site) {
    const auto [block, offset] = decode(address, site);
    if (offset % 4) fatal("alignment", "a load from a peer that is not aligned", site);
    maybe_preempt();
    if (block != device.running->block) check_peer_is_alive(*block, site);
    access_shared(device.running->actor, *block, offset, 4, false, nullptr);
    uint32_t bits;
    memcpy(&bits, block->shared + offset, 4);
    return bits;
}

void open_cluster_barrier(Cluster& cluster) {
    cluster.met = std::make_shared<const Clock>(std::move(cluster.arrivals.clock));
    cluster.arrivals = {};
    cluster.arrived = 0;
    ++cluster.phase;
    for (Fibre& f : cluster.fibres)
        if (f.wait == Wait::kCluster) wake(f);
}

void cluster_arrive(bool releases, Site site) {
    Fibre& fibre = *device.running;
    collective("barrier.cluster.arrive", site);
    if (fibre.arrived >= 0) fatal("cluster", "two arrivals at the cluster barrier without a wait", site);
    Cluster& cluster = *fibre.block->cluster;
    fibre.arrived = cluster.phase;
    cluster.arrivals.clock.resize(clock_size());
    if (releases) publish(fibre.actor, cluster.arrivals);
    if (++cluster.arrived == cluster.fibres.size() - cluster.ended) open_cluster_barrier(cluster);
}

void cluster_wait(Site site) {
    Fibre& fibre = *device.running;
    collective("barrier.cluster.wait", site);
    if (fibre.arrived < 0) fatal("cluster", "a wait at the cluster barrier without an arrival", site);
    Cluster& cluster = *fibre.block->cluster;
    if (cluster.phase == fibre.arrived) suspend(Wait::kCluster, site);
    fibre.arrived = -1;
    fibre.met = true;
    acquire(fibre.actor, cluster.met);
}

}  // namespace emulated

using emulated::device;

void __syncthreads(emulated::Site site) {
    emulated::collective("__syncthreads", site);
    emulated::Fibre& fibre = *device.running;
    emulated::Block& block = *fibre.block;
    fibre.site = site;
    block.at_barrier.push_back(&fibre);
    if (block.at_barrier.size() + block.done < block.threads.size())
        return emulated::suspend(emulated::Wait::kBlock, site);
    // The last to come wakes all, itself too, and takes its turn like the others.
    emulated::open_block_barrier(block);
    emulated::take_turn();
}

size_t __cvta_generic_to_shared(const void* pointer) {
    const auto offset = static_cast<const char*>(pointer) - device.running->block->shared;
    if (offset < 0 || offset >= static_cast<int64_t>(emulated::kWindow))
        emulated::fatal("out of bounds", "a pointer that is not to shared memory becomes a shared address");
    return static_cast<size_t>(offset) + emulated::kFirstAddress;
}
