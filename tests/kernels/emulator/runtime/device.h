// The emulated devices: one, or several whose launches run together. On each some clusters run at a time (one, where a
// launch is by itself), the threads of all as fibres of one thread of the host; every access is checked against the
// extent of its array and, by vector clocks, against the accesses it is not ordered with.
//
// threads.cpp runs the fibres, clusters.cpp starts and ends clusters, memory.cpp checks accesses, barriers.cpp holds
// what threads of a cluster wait for, flags.cpp what those of several devices wait for, host.cpp the launches and the
// interface to Python.
#pragma once

#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulated {

// --- order

// For each actor the last of its times that someone has seen.
using Clock = std::vector<uint32_t>;
using Seen = std::shared_ptr<const Clock>;  // one for all who saw the same

// A thread of a cluster, or a bulk copy by itself. Its time goes up whenever it publishes what it did. The clusters that
// run in one place after each other have the same actors; what they were before `born` they know like anyone else.
struct Actor {
    uint32_t id = 0, time = 1, born = 1;
    int device = 0;
    Seen seen;
};

// Which run of all that ever were (27 bits), which actor of it (15), at which of its times (22). 0 is never.
using Stamp = uint64_t;
constexpr Stamp stamp(uint64_t run, uint64_t actor, uint64_t time) { return run << 37 | actor << 22 | time; }
constexpr uint64_t run_of(Stamp s) { return s >> 37; }
constexpr uint32_t actor_of(Stamp s) { return static_cast<uint32_t>(s >> 22 & 0x7fff); }
constexpr uint32_t time_of(Stamp s) { return static_cast<uint32_t>(s & 0x3fffff); }
constexpr Stamp kByHost = stamp(1, 0, 0);
constexpr Stamp kSeveral = uint64_t{1} << 63;  // several readers: the rest is an index into Device::readers

// What several actors have published for others to acquire.
struct Published {
    Clock clock;
    Seen last;  // already in it
};

size_t clock_size();
bool ordered(Stamp, const Actor&);           // whether the actor has seen it
void publish(Actor&, Published& to);         // release
void acquire(Actor&, const Seen& from);
Stamp now(const Actor&);

// --- memory

// The last write of a granule and the reads since.
struct Cell {
    Stamp writer = 0, reader = 0;
};

// Rows of an array that a launch may read, or write.
struct Window {
    uintptr_t begin = 0;
    uint64_t pitch = 1, width = 0, rows = 0;  // in bytes
    std::vector<bool> closed;                 // rows that it may not touch at all
};

struct Array {
    std::string name;
    uintptr_t begin, end;
    int shift;      // log2 of the granule's bytes
    bool complete;  // all that may be written must be
    int reader = -1, writer = -1;  // the device that may read it, and that may write it; -1 for any
    Window read, write;
    std::vector<Cell> cells;  // none where nothing may be written: no order to watch
};

constexpr uint32_t kWindow = 512 * 1024;     // of address space for a block's shared memory
constexpr uint32_t kStaticRoom = 8192;       // of it for static variables
constexpr uint32_t kFirstAddress = 1024;     // of shared memory, as on the device
constexpr uint32_t kMostCluster = 8;         // blocks
constexpr uint32_t kMostBlocks = 64;         // that run at a time, on all devices
constexpr uint32_t kMostCopies = 1024;       // on their way at a time
char* shared_windows();

struct Block;
void access(uintptr_t address, size_t bytes, bool write, const void* code);
void access_global(const Actor&, uintptr_t address, size_t bytes, bool write, const void* code);
void access_shared(const Actor&, Block&, uint32_t offset, size_t bytes, bool write, const void* code);
Cell* allowed_cell(const Actor&, uintptr_t address, bool write, Site);  // of what a strong operation touches
void maybe_preempt();

// --- threads

enum class State { kReady, kWaiting, kDone };
enum class Wait { kNothing, kWarp, kBlock, kCluster, kMbarrier, kFlag };

struct Fibre {
    uint3 thread{}, block_index{};
    Actor actor;
    Block* block = nullptr;
    char *stack = nullptr, *top = nullptr;
    void* saved = nullptr;  // its stack pointer while it does not run
    State state = State::kReady;
    Wait wait = Wait::kNothing;
    Site site{"", 0};       // where it waits
    uint32_t operand = 0;   // result of a warp operation, or the mbarrier that it waits for
    size_t collectives = 0; // operations done that the lanes of its warp must all do
    int64_t arrived = -1;   // phase of the cluster barrier at which it arrived and for which it has not waited
    bool met = false;       // it has waited there: its peers have started
    uintptr_t polled = 0;   // the flag that it looked at last, and how many stores that had seen
    uint64_t polled_stores = 0;
};

struct Warp {
    uint32_t here = 0;  // lanes that have come to the operation
    WarpOperation operation = kSync;
    uint32_t mask = 0, values[32] = {}, operands[32] = {};
    Site site{"", 0};
    std::vector<Site> collectives;
};

struct Mbarrier {
    uint32_t count = 0, pending = 0, phase = 0;
    int64_t bytes = 0;
    Stamp init = 0;
    bool fenced = false;  // its initialisation, for the async proxy
    Published arrivals;
    Seen completed;
};

struct Copy {
    Actor actor;
    Block* block;
    uint32_t to, bytes, barrier;  // offsets in shared memory
    const char* from;
    Site site;
};

struct Variable {
    const void* key;
    std::string name;
    uint32_t offset, bytes;
};

struct Cluster;

struct Block {
    Cluster* cluster = nullptr;
    uint32_t rank = 0, place = 0;  // in its cluster, and of its shared memory among all that run
    char* shared = nullptr;
    std::vector<Cell> words, units;  // of static and of dynamic shared memory: 4 and 16 bytes
    std::vector<Warp> warps;
    std::vector<Fibre*> threads, at_barrier;
    size_t done = 0;
    std::map<uint32_t, Mbarrier> mbarriers;  // by offset
    std::vector<Stamp> by_peers;             // their stores
    Published ended;                         // what its threads had seen when they ended
};

// A launch and what is left of it to start.
struct Grid {
    Launch launch;
    std::vector<std::max_align_t> arguments;  // a copy of the launch's
    int device = 0;
    unsigned blocks = 1, threads = 1, cluster = 1;  // threads of a block, blocks of a cluster
    size_t dynamic_bytes = 0, dynamic_offset = 0, static_bytes = 0;
    std::vector<Variable> variables;
    std::vector<unsigned> order;  // in which its clusters start
    size_t started = 0, ended = 0;
    Seen before;     // what its device's earlier launches had seen
    Published after; // and what they have when it is over
};

// A place where a cluster runs, and the cluster that does.
struct Cluster {
    Grid* grid = nullptr;  // none while the place is empty
    int device = 0;
    uint32_t first_actor = 0, first_place = 0;
    std::vector<Fibre> fibres;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<uint32_t> times;  // of its actors when the last cluster ended
    int64_t phase = 0;            // of the cluster barrier
    size_t arrived = 0, ended = 0;
    Published arrivals;
    Seen met;
};

// A word that threads store and load as one, in an order that all agree upon.
struct Flag {
    Stamp last = 0;   // the last such store
    Seen released;    // what was released with it
    bool system = false;
    int device = 0;
    uint64_t stores = 0;
};

enum Order { kForward = 0, kBackward = 1, kRandom = 2 };
enum Arrival { kAtOnce = 0, kLate = 1, kAnyTime = 2 };  // of bulk copies

struct Device {
    // properties and schedule
    int major = 9, optin = 232448, per_multiprocessor = 233472, most_cluster = 8, refused_cluster = 9;
    int count = 1, current = 0, resident = 1;  // devices, that of the next launch, and clusters a device runs at a time
    bool together = false;                     // launches wait for `run_queued`
    int order = kForward, copies = kLate, preempt = 0, exp2_error = 0, planted = 0;
    std::mt19937 random{1};
    // memory
    std::vector<Array> arrays;
    std::vector<std::vector<Stamp>> readers;
    std::map<const void*, int> dynamic_limits;
    // what happened
    std::vector<std::string> faults, launches;
    std::map<std::string, int> seen_faults;
    cudaError_t error = cudaSuccess;
    // the run
    std::vector<std::unique_ptr<Grid>> queue;  // launches, each device's in their order
    bool aborted = false, trapped = false;
    uint64_t serial = 1;
    size_t threads = 0;  // that run at a time
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::deque<Fibre*> ready;
    std::vector<Copy> copying;
    std::vector<uint32_t> idle_copies, copy_times;
    std::map<uintptr_t, Flag> flags;
    uint64_t nanoseconds = 1;
    int waited = 0;  // times that the clock was put forward since a flag was stored
    Fibre* running = nullptr;
    void* scheduler = nullptr;  // its stack pointer while a fibre runs
    int until_preempted = 0;
};
extern Device device;

cudaError_t run_queued();
void run_fibres();
void start_clusters();
bool all_ended();
void start_thread(Fibre&);  // it begins at the top of its stack
char* stack_of(const Actor&);
constexpr size_t kStack = 128 * 1024;
void suspend(Wait, Site);  // the running thread, until something wakes it
void take_turn();          // the running thread, which has been woken already
void wake(Fibre&);
void meet(const std::vector<Fibre*>&);  // each sees what all have done

// --- barriers

Warp& warp_of(const Fibre&);
void open_block_barrier(Block&);
void open_cluster_barrier(Cluster&);
bool time_passes();  // false where that helps no one
void end_cluster(Cluster&);
void finish_copy(size_t index);

// --- reports

struct Abandoned {};  // thrown by `fatal` where no fibre runs
void fault(const std::string& kind, const std::string& text, const void* code = nullptr);
[[noreturn]] void fatal(const std::string& kind, const std::string& text, const void* code = nullptr);
[[noreturn]] void fatal(const std::string& kind, const std::string& text, Site);
std::string at(Site);
std::string who(const Actor&);

}  // namespace emulated
