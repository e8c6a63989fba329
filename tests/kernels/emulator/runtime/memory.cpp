// Each access of device code is checked here. g++ -fsanitize=thread calls __tsan_read4 and the like at every load and
// store; the functions at the end stand in for its library, and for that of -fsanitize=undefined.
#include <dlfcn.h>
#include <sys/mman.h>

#include "device.h"

namespace emulated {

Device device;

// --- reports

std::string at(Site site) {
    const char* slash = strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string who(const Actor& actor) {
    if (actor.id >= device.threads) return "bulk copy " + std::to_string(actor.id - device.threads);
    for (const auto& cluster : device.clusters) {
        const size_t index = actor.id - cluster->first_actor;
        if (actor.id < cluster->first_actor || index >= cluster->times.size()) continue;
        const size_t per_block = cluster->grid ? cluster->grid->threads : 1;
        const std::string text =
            "thread " + std::to_string(index % per_block) + " of block " + std::to_string(index / per_block);
        return device.count == 1 ? text : text + " of device " + std::to_string(cluster->device);
    }
    return "the host";
}

// `code` is the address of the access, which tools such as addr2line turn into a line.
void fault(const std::string& kind, const std::string& text, const void* code) {
    char where[64] = "";
    Dl_info info;
    if (code && dladdr(code, &info))
        snprintf(where, sizeof where, " (code +0x%zx)",
                 static_cast<size_t>(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)));
    const std::string key = kind + (code ? where : text);
    if (device.seen_faults[key]++ || device.faults.size() >= 100) return;  // each place once
    device.faults.push_back(kind + ": " + text + where);
}

// --- the order of accesses to a granule

static std::string by(Stamp s) {
    if (run_of(s) != device.serial) return "an earlier launch";
    Actor actor;
    actor.id = actor_of(s);
    return who(actor);
}

template <class Name>
static void read_cell(Cell& cell, const Actor& actor, const Name& name, const void* code) {
    const Stamp mine = now(actor);
    if (cell.reader == mine) return;
    if (!cell.writer) return fault("uninitialised read", name() + " by " + who(actor), code);
    if (!ordered(cell.writer, actor))
        fault("race", "read of " + name() + " by " + who(actor) + ", written by " + by(cell.writer), code);
    if (cell.reader & kSeveral) {
        auto& readers = device.readers[cell.reader & ~kSeveral];
        if (readers.back() != mine) readers.push_back(mine);
    } else if (cell.reader && !ordered(cell.reader, actor)) {
        device.readers.push_back({cell.reader, mine});
        cell.reader = kSeveral | (device.readers.size() - 1);
    } else {
        cell.reader = mine;
    }
}

template <class Name>
static void write_cell(Cell& cell, const Actor& actor, const Name& name, const void* code) {
    const Stamp mine = now(actor);
    if (cell.writer == mine && !cell.reader) return;
    const auto check = [&](Stamp other, const char* did) {
        if (other && !ordered(other, actor))
            fault("race", "write of " + name() + " by " + who(actor) + did + by(other), code);
    };
    check(cell.writer, ", written by ");
    if (cell.reader & kSeveral) {
        auto& readers = device.readers[cell.reader & ~kSeveral];
        for (Stamp reader : readers) check(reader, ", read by ");
        std::vector<Stamp>().swap(readers);
    } else {
        check(cell.reader, ", read by ");
    }
    cell = {mine, 0};
}

// --- shared memory

char* shared_windows() {
    static char* windows = static_cast<char*>(mmap(nullptr, kMostBlocks * kWindow, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return windows;
}

static std::string name_of(const Block& block, uint32_t offset) {
    const std::string name = "shared memory of block " + std::to_string(block.rank) + ", ";
    for (const Variable& v : block.cluster->grid->variables)
        if (offset >= v.offset && offset < v.offset + v.bytes)
            return name + v.name + "+" + std::to_string(offset - v.offset);
    return name + "dynamic+" +
           std::to_string(static_cast<int64_t>(offset) - static_cast<int64_t>(block.cluster->grid->dynamic_offset));
}

static bool in_a_variable(const Block& block, uint32_t offset, size_t bytes) {
    for (const Variable& v : block.cluster->grid->variables)
        if (offset >= v.offset && offset + bytes <= v.offset + v.bytes) return true;
    return false;
}

void access_shared(const Actor& actor, Block& block, uint32_t offset, size_t bytes, bool write, const void* code) {
    const Grid& grid = *block.cluster->grid;
    const bool dynamic = offset >= grid.dynamic_offset;
    const size_t start = dynamic ? grid.dynamic_offset : 0, granule = dynamic ? 16 : 4;
    if (dynamic ? offset + bytes > grid.dynamic_offset + grid.dynamic_bytes : !in_a_variable(block, offset, bytes))
        fatal("out of bounds", std::to_string(bytes) + " bytes of " + name_of(block, offset) + " by " + who(actor),
              code);
    if (!dynamic)
        for (const auto& entry : block.mbarriers)
            if (offset < entry.first + 8 && entry.first < offset + bytes)
                fatal("mbarrier", name_of(block, offset) + " touched by an ordinary access of " + who(actor), code);
    for (size_t i = (offset - start) / granule; i <= (offset - start + bytes - 1) / granule; ++i) {
        Cell& cell = (dynamic ? block.units : block.words)[i];
        const auto name = [&] { return name_of(block, static_cast<uint32_t>(start + i * granule)); };
        if (write)
            write_cell(cell, actor, name, code);
        else
            read_cell(cell, actor, name, code);
    }
}

// --- the arrays of a launch

static Array* array_at(uintptr_t address) {
    static size_t last = 0;
    auto& arrays = device.arrays;
    if (last < arrays.size() && address >= arrays[last].begin && address < arrays[last].end) return &arrays[last];
    for (size_t i = 0; i < arrays.size(); ++i)
        if (address >= arrays[i].begin && address < arrays[i].end) return &arrays[last = i];
    return nullptr;
}

static bool allows(const Window& window, uintptr_t address, size_t bytes) {
    if (address < window.begin) return false;
    const uint64_t offset = address - window.begin, row = window.rows > 1 ? offset / window.pitch : 0;
    return row < window.rows && offset - row * window.pitch + bytes <= window.width &&
           (window.closed.empty() || !window.closed[row]);
}

static std::string place_in(const Array& array, uintptr_t address) {
    const Window& rows = array.read.rows ? array.read : array.write;
    const uint64_t offset = address - array.begin;
    return array.name + ", byte " + std::to_string(offset % rows.pitch) + " of row " +
           std::to_string(offset / rows.pitch);
}

static Array& checked_array(const Actor& actor, uintptr_t address, size_t bytes, bool write, const void* code) {
    Array* array = array_at(address);
    const std::string what = write ? "write of " : "read of ";
    if (!array) fatal("out of bounds", what + "what no array of the launch holds, by " + who(actor), code);
    const int owner = write ? array->writer : array->reader;
    if (!allows(write ? array->write : array->read, address, bytes) || (owner >= 0 && owner != actor.device))
        fatal("out of bounds",
              what + std::to_string(bytes) + " bytes of " + place_in(*array, address) + " by " + who(actor), code);
    return *array;
}

Cell* allowed_cell(const Actor& actor, uintptr_t address, bool write, Site site) {
    if (address % 4) fatal("alignment", "a word that is not aligned", site);
    Array& array = checked_array(actor, address, 4, write, nullptr);
    return array.cells.empty() ? nullptr : &array.cells[(address - array.begin) >> array.shift];
}

void access_global(const Actor& actor, uintptr_t address, size_t bytes, bool write, const void* code) {
    Array* array = &checked_array(actor, address, bytes, write, code);
    if (array->cells.empty()) return;
    const uint64_t offset = address - array->begin;
    for (uint64_t i = offset >> array->shift; i <= (offset + bytes - 1) >> array->shift; ++i) {
        const auto name = [&] { return place_in(*array, array->begin + (i << array->shift)); };
        if (write)
            write_cell(array->cells[i], actor, name, code);
        else
            read_cell(array->cells[i], actor, name, code);
    }
}

// --- every access

void maybe_preempt() {
    if (!device.preempt || --device.until_preempted > 0) return;
    device.until_preempted = 1 + static_cast<int>(device.random() % static_cast<unsigned>(2 * device.preempt));
    wake(*device.running);
    take_turn();
}

// The launch and its arguments, and constants of the program.
static bool readable_by_all(uintptr_t address, size_t bytes) {
    const auto inside = [&](const void* begin, size_t size) {
        const auto start = reinterpret_cast<uintptr_t>(begin);
        return address >= start && address + bytes <= start + size;
    };
    const Launch& launch = device.running->block->cluster->grid->launch;
    if (inside(launch.arguments, launch.argument_bytes) || inside(&launch, sizeof launch)) return true;
    Dl_info of_address, own;
    return dladdr(reinterpret_cast<void*>(address), &of_address) && dladdr(&device, &own) &&
           of_address.dli_fbase == own.dli_fbase;
}

void access(uintptr_t address, size_t bytes, bool write, const void* code) {
    Fibre* fibre = device.running;
    if (!fibre) return;  // the host's code
    if (address >= reinterpret_cast<uintptr_t>(fibre->stack) && address < reinterpret_cast<uintptr_t>(fibre->top))
        return;
    maybe_preempt();
    const auto windows = reinterpret_cast<uintptr_t>(shared_windows());
    if (address >= windows && address < windows + kMostBlocks * kWindow) {
        const size_t place = (address - windows) / kWindow;
        if (place != fibre->block->place)
            fatal("out of bounds", "a plain access to shared memory of another block, place " + std::to_string(place) +
                                       ", by " + who(fibre->actor), code);
        const auto offset = static_cast<uint32_t>((address - windows) % kWindow);
        return access_shared(fibre->actor, *fibre->block, offset, bytes, write, code);
    }
    if (!write && !array_at(address) && readable_by_all(address, bytes)) return;
    access_global(fibre->actor, address, bytes, write, code);
}

}  // namespace emulated

// --- what g++ calls

#define ACCESS(name, bytes, write)                                                                        \
    extern "C" __attribute__((noinline)) void __tsan_##name(void* p) {                                    \
        emulated::access(reinterpret_cast<uintptr_t>(p), bytes, write, __builtin_return_address(0));      \
    }
#define ACCESSES(bytes)                     \
    ACCESS(read##bytes, bytes, false)       \
    ACCESS(write##bytes, bytes, true)       \
    ACCESS(unaligned_read##bytes, bytes, false) \
    ACCESS(unaligned_write##bytes, bytes, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
__attribute__((noinline)) void __tsan_read_range(void* p, size_t bytes) {
    emulated::access(reinterpret_cast<uintptr_t>(p), bytes, false, __builtin_return_address(0));
}
__attribute__((noinline)) void __tsan_write_range(void* p, size_t bytes) {
    emulated::access(reinterpret_cast<uintptr_t>(p), bytes, true, __builtin_return_address(0));
}

struct UndefinedAt {  // how the data of every report begin
    const char* file;
    uint32_t line, column;
};
static void undefined(const char* what, void* data) {
    const auto* place = static_cast<UndefinedAt*>(data);
    emulated::fault("undefined behaviour",
                    what + (" at " + emulated::at({place->file, static_cast<int>(place->line)})));
}
#define UNDEFINED(name, what) \
    void __ubsan_handle_##name(void* data) { undefined(what, data); }
UNDEFINED(type_mismatch_v1, "an address that is misaligned, or of too small an object")
UNDEFINED(add_overflow, "overflow of +")
UNDEFINED(sub_overflow, "overflow of -")
UNDEFINED(mul_overflow, "overflow of *")
UNDEFINED(negate_overflow, "overflow of unary -")
UNDEFINED(divrem_overflow, "division by zero or overflow of /")
UNDEFINED(shift_out_of_bounds, "shift out of bounds")
UNDEFINED(out_of_bounds, "index out of bounds")
UNDEFINED(float_cast_overflow, "value outside the type it is cast to")
UNDEFINED(load_invalid_value, "invalid bool or enum")
UNDEFINED(pointer_overflow, "offset added to null, or overflow of a pointer")
UNDEFINED(builtin_unreachable, "unreachable code reached")
UNDEFINED(missing_return, "no value returned")
UNDEFINED(nonnull_arg, "null argument")
UNDEFINED(invalid_builtin, "invalid argument of a builtin")
}
