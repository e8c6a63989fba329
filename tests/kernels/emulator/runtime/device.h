// The emulated device. One cluster runs at a time, its threads as fibres of one thread of the host; every access is
// checked against the extent of its array and, by vector clocks, against the accesses it is not ordered with.
//
// threads.cpp runs the fibres, memory.cpp checks accesses, barriers.cpp holds what threads wait for, host.cpp the
// launches and the interface to Python.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulated {

// --- order

// For each actor of a cluster the last of its times that someone has seen.
using Clock = std::vector<uint32_t>;
using Seen = std::shared_ptr<const Clock>;  // one for all who saw the same

// A thread of the cluster, or a bulk copy by itself. Its time goes up whenever it publishes what it did.
struct Actor {
    uint32_t id = 0, time = 1;
    Seen seen;
};

// Which cluster of all that ever ran (27 bits), which actor of it (15), at which of its times (22). 0 is never.
using Stamp = uint64_t;
constexpr Stamp stamp(uint64_t cluster, uint64_t actor, uint64_t time) { return cluster << 37 | actor << 22 | time; }
constexpr uint64_t cluster_of(Stamp s) { return s >> 37; }
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
    Window read, write;
    std::vector<Cell> cells;  // none where nothing may be written: no order to watch
};

constexpr uint32_t kWindow = 512 * 1024;     // of address space for a block's shared memory
constexpr uint32_t kStaticRoom = 8192;       // of it for static variables
constexpr uint32_t kFirstAddress = 1024;     // of shared memory, as on the device
constexpr uint32_t kMostBlocks = 8;          // of a cluster
constexpr uint32_t kMostCopies = 1024;       // of a cluster
char* shared_windows();

struct Block;
void access(uintptr_t address, size_t bytes, bool write, const void* code);
void access_global(const Actor&, uintptr_t address, size_t bytes, bool write, const void* code);
void access_shared(const Actor&, Block&, uint32_t offset, size_t bytes, bool write, const void* code);

// --- threads

enum class State { kReady, kWaiting, kDone };
enum class Wait { kNothing, kWarp, kBlock, kCluster, kMbarrier };

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

struct Block {
    uint32_t rank = 0;
    char* shared = nullptr;
    std::vector<Cell> words, units;  // of static and of dynamic shared memory: 4 and 16 bytes
    std::vector<Warp> warps;
    std::vector<Fibre*> threads, at_barrier;
    size_t done = 0;
    std::map<uint32_t, Mbarrier> mbarriers;  // by offset
    std::vector<Stamp> by_peers;             // their stores
    Published ended;                         // what its threads had seen when they ended
};

enum Order { kForward = 0, kBackward = 1, kRandom = 2 };
enum Arrival { kAtOnce = 0, kLate = 1, kAnyTime = 2 };  // of bulk copies

struct Device {
    // properties and schedule
    int major = 9, optin = 232448, per_multiprocessor = 233472, most_cluster = 8, refused_cluster = 9;
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
    // the running launch
    const Launch* launch = nullptr;
    size_t dynamic_bytes = 0, dynamic_offset = 0, static_bytes = 0;
    std::vector<Variable> variables;
    unsigned bound_threads = 0;
    bool aborted = false;
    uint64_t serial = 1, first_serial = 2;  // of the running cluster, and of its launch's first
    // the running cluster
    unsigned cluster = 1;
    size_t threads = 0;
    std::vector<Fibre> fibres;
    std::vector<std::unique_ptr<Block>> blocks;
    std::deque<Fibre*> ready;
    std::vector<Copy> copying;
    uint32_t copies_made = 0;
    int64_t phase = 0;  // of the cluster barrier
    size_t arrived = 0, ended = 0;
    Published arrivals;
    Seen met;
    Fibre* running = nullptr;
    void* scheduler = nullptr;  // its stack pointer while a fibre runs
    int until_preempted = 0;
};
extern Device device;

void run_cluster(unsigned index, unsigned threads);
void suspend(Wait, Site);  // the running thread, until something wakes it
void take_turn();          // the running thread, which has been woken already
void wake(Fibre&);
void meet(const std::vector<Fibre*>&);  // each sees what all have done

// --- barriers

Warp& warp_of(const Fibre&);
void open_block_barrier(Block&);
void open_cluster_barrier();
void finish_copy(size_t index);

// --- reports

struct Abandoned {};  // thrown by `fatal` where no fibre runs
void fault(const std::string& kind, const std::string& text, const void* code = nullptr);
[[noreturn]] void fatal(const std::string& kind, const std::string& text, const void* code = nullptr);
[[noreturn]] void fatal(const std::string& kind, const std::string& text, Site);
std::string at(Site);
std::string who(const Actor&);

}  // namespace emulated
