// Threads as fibres: how they are switched, in which order they run, and what each has seen of the others.
#include <sys/mman.h>

#include <algorithm>

#include "device.h"

#ifndef __x86_64__
#error "emulated_switch is written for x86-64"
#endif
// Saves the registers that a call keeps, on the stack, and goes on where `load` was saved.
extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch,@function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");

namespace emulated {

constexpr size_t kMostThreads = kMostBlocks * 1024;

// --- switching

static void to_scheduler() {
    Fibre* fibre = device.running;
    device.running = nullptr;
    emulated_switch(&fibre->saved, device.scheduler);
}

void suspend(Wait wait, Site site) {
    Fibre& fibre = *device.running;
    fibre.state = State::kWaiting;
    fibre.wait = wait;
    fibre.site = site;
    to_scheduler();
}

void wake(Fibre& fibre) {
    fibre.state = State::kReady;
    fibre.wait = Wait::kNothing;
    device.ready.push_back(&fibre);
}

void take_turn() { to_scheduler(); }

void fatal(const std::string& kind, const std::string& text, const void* code) {
    fault(kind, text, code);
    device.aborted = true;
    if (!device.running) throw Abandoned{};
    to_scheduler();  // for good
    __builtin_unreachable();
}

void fatal(const std::string& kind, const std::string& text, Site site) { fatal(kind, text + " at " + at(site)); }

// --- vector clocks

size_t clock_size() { return device.threads + kMostCopies + 1; }

Stamp now(const Actor& actor) { return stamp(device.serial, actor.id, actor.time); }

bool ordered(Stamp s, const Actor& actor) {
    if (run_of(s) < device.serial) return true;  // of an earlier run
    if (actor_of(s) == actor.id && time_of(s) >= actor.born) return true;
    return (*actor.seen)[actor_of(s)] >= time_of(s);
}

static void raise(Clock& to, const Clock& from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void publish(Actor& actor, Published& to) {
    to.clock.resize(clock_size());
    if (to.last != actor.seen) raise(to.clock, *actor.seen);
    to.last = actor.seen;
    to.clock[actor.id] = std::max(to.clock[actor.id], actor.time);
    ++actor.time;
}

void acquire(Actor& actor, const Seen& from) {
    static Seen had, got, result;  // many threads in a row merge the same two
    if (had != actor.seen || got != from) {
        auto merged = std::make_shared<Clock>(*actor.seen);
        raise(*merged, *from);
        had = actor.seen;
        got = from;
        result = std::move(merged);
    }
    actor.seen = result;
}

void meet(const std::vector<Fibre*>& fibres) {
    Published all;
    for (Fibre* f : fibres) publish(f->actor, all);
    const auto seen = std::make_shared<const Clock>(std::move(all.clock));
    for (Fibre* f : fibres) f->actor.seen = seen;
}

// --- the life of a thread

static void check_end_of_block(Block& block) {
    Actor last;
    last.id = static_cast<uint32_t>(clock_size() - 1);
    last.seen = std::make_shared<const Clock>(block.ended.clock);
    for (Stamp s : block.by_peers)
        if (!ordered(s, last))
            fault("lifetime", "block " + std::to_string(block.rank) + " may end before a peer writes its shared memory");
    for (const Copy& copy : device.copying)
        if (copy.block == &block) fault("lifetime", "a block ended before its bulk copy of " + at(copy.site));
}

static void end_thread() {
    Fibre& fibre = *device.running;
    Block& block = *fibre.block;
    Cluster& cluster = *block.cluster;
    const auto& collectives = warp_of(fibre).collectives;
    fibre.state = State::kDone;
    ++block.done;
    ++cluster.ended;
    if (fibre.arrived >= 0)
        fault("cluster", who(fibre.actor) + " ended between arrival and wait at the cluster barrier");
    if (fibre.collectives != collectives.size())
        fault("divergence", "a lane ended, another of its warp went to " + at(collectives[fibre.collectives]));
    publish(fibre.actor, block.ended);
    if (!block.at_barrier.empty() && block.done + block.at_barrier.size() == block.threads.size())
        open_block_barrier(block);
    if (cluster.arrived && cluster.arrived == cluster.fibres.size() - cluster.ended) open_cluster_barrier(cluster);
    if (block.done == block.threads.size()) check_end_of_block(block);
}

static void thread_main() {
    const Launch& launch = device.running->block->cluster->grid->launch;
    launch.thread(launch);
    end_thread();
    to_scheduler();
    __builtin_unreachable();
}

char* stack_of(const Actor& actor) {
    static char* memory = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return memory + actor.id * kStack;
}

void start_thread(Fibre& fibre) {
    auto* words = reinterpret_cast<void**>(fibre.top) - 2;  // thread_main starts as if it were called
    words[1] = nullptr;
    words[0] = reinterpret_cast<void*>(&thread_main);
    for (int i = 0; i < 6; ++i) *--words = nullptr;
    fibre.saved = words;
    device.ready.push_back(&fibre);
}

static Fibre* next_ready() {
    auto& ready = device.ready;
    if (device.order == kForward) {
        Fibre* first = ready.front();
        ready.pop_front();
        return first;
    }
    const size_t i = device.order == kRandom ? device.random() % ready.size() : ready.size() - 1;
    std::swap(ready[i], ready.back());
    Fibre* chosen = ready.back();
    ready.pop_back();
    return chosen;
}

static void report_deadlock() {
    static const char* const names[] = {"nothing", "a warp operation", "__syncthreads", "the cluster barrier",
                                        "an mbarrier", "a flag"};
    std::map<std::string, int> waits;
    for (const auto& cluster : device.clusters)
        for (const Fibre& f : cluster->fibres)
            if (f.state == State::kWaiting) ++waits[names[static_cast<int>(f.wait)] + (" at " + at(f.site))];
    std::string text;
    for (const auto& [what, count] : waits) text += std::to_string(count) + " threads wait for " + what + "; ";
    fault("deadlock", text);
    device.aborted = true;
}

// A copy that is ready to arrive does so when nothing else can go on, or at any time.
static bool a_copy_arrives() {
    if (device.copying.empty()) return false;
    const bool any_time = device.copies == kAnyTime;
    if (!device.ready.empty() && !(any_time && device.random() % 16 == 0)) return false;
    try {
        finish_copy(any_time ? device.random() % device.copying.size() : device.copying.size() - 1);
    } catch (Abandoned) {
    }
    return true;
}

void run_fibres() {
    while (!device.aborted) {
        start_clusters();
        if (a_copy_arrives()) continue;
        if (device.ready.empty()) {
            if (all_ended()) break;
            if (time_passes()) continue;
            report_deadlock();
            break;
        }
        Fibre* fibre = device.running = next_ready();
        emulated_switch(&device.scheduler, fibre->saved);
        Cluster& cluster = *fibre->block->cluster;
        if (cluster.ended == cluster.fibres.size()) end_cluster(cluster);
    }
}

}  // namespace emulated
