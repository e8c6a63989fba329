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

constexpr size_t kStack = 128 * 1024;
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
    if (cluster_of(s) < device.first_serial) return true;  // of an earlier launch
    if (cluster_of(s) != device.serial) return false;
    return actor_of(s) == actor.id || (*actor.seen)[actor_of(s)] >= time_of(s);
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
    const auto& collectives = warp_of(fibre).collectives;
    fibre.state = State::kDone;
    ++block.done;
    ++device.ended;
    if (fibre.arrived >= 0)
        fault("cluster", who(fibre.actor) + " ended between arrival and wait at the cluster barrier");
    if (fibre.collectives != collectives.size())
        fault("divergence", "a lane ended, another of its warp went to " + at(collectives[fibre.collectives]));
    publish(fibre.actor, block.ended);
    if (!block.at_barrier.empty() && block.done + block.at_barrier.size() == block.threads.size())
        open_block_barrier(block);
    if (device.arrived && device.arrived == device.threads - device.ended) open_cluster_barrier();
    if (block.done == block.threads.size()) check_end_of_block(block);
}

static void thread_main() {
    device.launch->thread(*device.launch);
    end_thread();
    to_scheduler();
    __builtin_unreachable();
}

static char* stacks() {
    static char* memory = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return memory;
}

static void* fresh_stack(char* top) {
    auto* words = reinterpret_cast<void**>(top) - 2;  // thread_main starts as if it were called
    words[1] = nullptr;
    words[0] = reinterpret_cast<void*>(&thread_main);
    for (int i = 0; i < 6; ++i) *--words = nullptr;
    return words;
}

// --- a cluster

static void prepare_block(unsigned index, unsigned rank, unsigned threads) {
    auto& slot = device.blocks[rank];
    std::vector<Cell> words, units;  // their memory is kept; serial numbers tell old stamps
    if (slot) words.swap(slot->words), units.swap(slot->units);
    slot = std::make_unique<Block>();
    Block& block = *slot;
    block.words.swap(words);
    block.units.swap(units);
    block.words.resize(kStaticRoom / 4);
    block.units.resize(std::max(block.units.size(), device.dynamic_bytes / 16 + 1));
    block.rank = rank;
    block.shared = shared_windows() + rank * kWindow;
    block.warps.resize((threads + 31) / 32);
    memset(block.shared, 0xff, kStaticRoom + 1024 + device.dynamic_bytes);  // NaN
    const auto nothing = std::make_shared<const Clock>(clock_size());
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& fibre = device.fibres[rank * threads + i];
        fibre.thread = {i, 0, 0};
        fibre.block_index = {index * device.cluster + rank, 0, 0};
        fibre.actor.id = rank * threads + i;
        fibre.actor.seen = nothing;
        fibre.block = &block;
        fibre.stack = stacks() + fibre.actor.id * kStack;
        fibre.top = fibre.stack + kStack - 64;
        fibre.saved = fresh_stack(fibre.top);
        block.threads.push_back(&fibre);
    }
}

static void prepare_cluster(unsigned index, unsigned threads) {
    device.blocks.resize(device.cluster);
    device.fibres.assign(device.threads, {});
    device.ready.clear();
    device.copying.clear();
    device.copies_made = 0;
    device.phase = 0;
    device.arrived = device.ended = 0;
    device.arrivals = {};
    for (unsigned rank = 0; rank < device.cluster; ++rank) prepare_block(index, rank, threads);
    for (Fibre& f : device.fibres) device.ready.push_back(&f);
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
                                        "an mbarrier"};
    std::map<std::string, int> waits;
    for (const Fibre& f : device.fibres)
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

void run_cluster(unsigned index, unsigned threads) {
    prepare_cluster(index, threads);
    while (!device.aborted) {
        if (a_copy_arrives()) continue;
        if (device.ready.empty()) {
            if (device.ended < device.threads) report_deadlock();
            break;
        }
        device.running = next_ready();
        emulated_switch(&device.scheduler, device.running->saved);
    }
    ++device.serial;
}

}  // namespace emulated
