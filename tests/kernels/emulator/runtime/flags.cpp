// What threads of several clusters and devices tell each other by: words that are stored and loaded as one, atomic
// counters, and the clock that bounds a wait.
#include "device.h"

namespace emulated {

constexpr uint64_t kStep = 1000000000;  // nanoseconds by which the clock goes forward where nothing else can happen
constexpr int kMostSteps = 100;         // after so many in which no flag was stored nobody will end the wait

static void check_plain_accesses(const Cell& cell, const Flag& flag, const Actor& actor, bool write, Site site) {
    const bool strong = cell.writer == flag.last;
    const bool unseen = !strong && cell.writer && !ordered(cell.writer, actor);
    const bool read = write && cell.reader && !(cell.reader & kSeveral) && !ordered(cell.reader, actor);
    if (unseen || read) fault("race", "a plain access and one of a flag by " + who(actor) + ", at " + at(site));
}

void strong_store(uint32_t* to, uint32_t value, bool releases, Scope scope, Site site) {
    maybe_preempt();
    Fibre& fibre = *device.running;
    const auto address = reinterpret_cast<uintptr_t>(to);
    Cell* cell = allowed_cell(fibre.actor, address, true, site);
    Flag& flag = device.flags[address];
    flag.last = now(fibre.actor);
    if (cell) {
        check_plain_accesses(*cell, flag, fibre.actor, true, site);
        *cell = {flag.last, 0};
    }
    Published own;
    if (releases) publish(fibre.actor, own);
    flag.released = releases ? std::make_shared<const Clock>(std::move(own.clock)) : nullptr;
    flag.system = scope == kSystem;
    flag.device = fibre.actor.device;
    ++flag.stores;
    device.waited = 0;
    *to = value;
    for (const auto& cluster : device.clusters)
        for (Fibre& f : cluster->fibres)
            if (f.wait == Wait::kFlag && f.polled == address) wake(f);
}

// The second look at a flag that nobody has stored meanwhile waits until someone does, or until time has passed.
uint32_t strong_load(const uint32_t* from, bool acquires, Scope scope, Site site) {
    maybe_preempt();
    Fibre& fibre = *device.running;
    const auto address = reinterpret_cast<uintptr_t>(from);
    const Cell* cell = allowed_cell(fibre.actor, address, false, site);
    Flag& flag = device.flags[address];
    if (fibre.polled == address && fibre.polled_stores == flag.stores) suspend(Wait::kFlag, site);
    fibre.polled = address;
    fibre.polled_stores = flag.stores;
    if (cell) check_plain_accesses(*cell, flag, fibre.actor, false, site);
    const bool in_scope = fibre.actor.device == flag.device || (flag.system && scope == kSystem);
    if (acquires && flag.released && in_scope) acquire(fibre.actor, flag.released);
    return *from;
}

uint64_t nanoseconds() { return ++device.nanoseconds; }

bool time_passes() {
    bool any = false;
    for (const auto& cluster : device.clusters)
        for (Fibre& f : cluster->fibres) {
            if (f.wait != Wait::kFlag) continue;
            any = true;
            wake(f);
        }
    device.nanoseconds += kStep;
    return any && ++device.waited <= kMostSteps;
}

void trap() {
    device.trapped = device.aborted = true;
    suspend(Wait::kNothing, {"", 0});  // for good
    __builtin_unreachable();
}

}  // namespace emulated

unsigned atomicInc(unsigned* address, unsigned last, emulated::Site site) {
    emulated::maybe_preempt();
    emulated::allowed_cell(emulated::device.running->actor, reinterpret_cast<uintptr_t>(address), true, site);
    const unsigned before = *address;
    *address = before >= last ? 0 : before + 1;
    return before;
}
