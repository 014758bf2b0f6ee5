// The emulator that emulator.h describes, what the emulated library has in place of device.cu, and what tests ask of it.
#include "emulator.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "../../../mpsearch/kernels/cuda/api.h"
#include "../../../mpsearch/kernels/cuda/ptx.cuh"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10;

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Barrier {
    int arrived = 0;
    uint64_t generation = 0;
};

struct Fiber {
    std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
    ucontext_t start;
    jmp_buf at;
    bool begun, done;
    std::vector<Copy> open;                // not yet in a group
    std::deque<std::vector<Copy>> groups;  // in flight, oldest first
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Barrier> warps;
std::vector<std::vector<uint8_t>> slots;  // of a warp: what its lanes exchange
Barrier block;
int n_threads;
bool progress;
uint8_t* shared;
jmp_buf scheduler;
void (*body)(const void*);
const void* context;

void yield() {
    if (!_setjmp(fibers[current]->at)) _longjmp(scheduler, 1);
}

void arrive(Barrier& barrier, int expected) {
    const uint64_t generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        progress = true;
        return;
    }
    while (barrier.generation == generation) yield();
}

}  // namespace

// Memory that ends (but for its alignment to 16 bytes) where touching it is a fault.
uint8_t* guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page + page;
    auto* memory = static_cast<uint8_t*>(
        mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(memory + whole - page, page, PROT_NONE);
    memset(memory, 0xa5, whole - page);
    return memory + whole - page - (bytes + 15) / 16 * 16;
}

uint8_t* shared_memory() {
    return shared;
}

void sync_block() {
    arrive(block, n_threads);
}

void sync_warp() {
    arrive(warps[current / kLanes], kLanes);
}

void* warp_slots(size_t bytes) {
    std::vector<uint8_t>& of_warp = slots[current / kLanes];
    if (of_warp.size() < bytes) of_warp.resize(bytes);
    return of_warp.data();
}

void copy_later(void* to, const void* from, size_t bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) {
        fprintf(stderr, "a copy of %zu bytes is not aligned\n", bytes);
        abort();
    }
    fibers[current]->open.push_back({to, from, bytes});
}
void end_copy_group() {
    Fiber& fiber = *fibers[current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
void wait_for_copies(size_t left) {
    auto& groups = fibers[current]->groups;
    for (; groups.size() > left; groups.pop_front())
        for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
}

namespace {

void run_fiber() {
    body(context);
    fibers[current]->done = true;
    progress = true;
    _longjmp(scheduler, 1);
}

// One block; false where its threads wait for one another forever.
bool run_block(std::mt19937& random) {
    for (int i = 0; i < n_threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.begun = fiber.done = false;
        fiber.open.clear();
        fiber.groups.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.start, run_fiber, 0);
    }
    block = {};
    warps.assign(static_cast<size_t>((n_threads + kLanes - 1) / kLanes), {});
    slots.resize(warps.size());
    static std::vector<int> order;
    order.resize(static_cast<size_t>(n_threads));
    for (int i = 0; i < n_threads; ++i) order[i] = i;
    static volatile bool all_done;
    static size_t at;
    do {
        if (seed) std::shuffle(order.begin(), order.end(), random);
        progress = false;
        all_done = true;
        for (at = 0; at < order.size(); ++at) {
            current = order[at];
            Fiber& fiber = *fibers[current];
            if (fiber.done) continue;
            all_done = false;
            threadIdx.x = static_cast<unsigned>(current);
            if (!_setjmp(scheduler)) {
                if (fiber.begun) _longjmp(fiber.at, 1);
                fiber.begun = true;
                setcontext(&fiber.start);
            }
        }
    } while (!all_done && progress);
    return all_done;
}

}  // namespace

int run(int64_t grid, int threads, int64_t shared_bytes, void (*kernel)(const void*), const void* job) {
    while (fibers.size() < static_cast<size_t>(threads)) fibers.push_back(std::make_unique<Fiber>());
    body = kernel;
    context = job;
    n_threads = threads;
    blockDim.x = static_cast<unsigned>(threads);
    gridDim.x = static_cast<unsigned>(grid);
    std::mt19937 random(seed);
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t whole = (static_cast<size_t>(shared_bytes) + page - 1) / page * page;
    shared = guarded(static_cast<size_t>(shared_bytes));
    bool finished = true;
    for (int64_t i = 0; i < grid && finished; ++i) {
        blockIdx.x = static_cast<unsigned>(seed ? grid - 1 - i : i);
        memset(shared, 0xa5, static_cast<size_t>(shared_bytes));
        finished = run_block(random);
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(shared) / page * page;
    munmap(reinterpret_cast<void*>(begin), whole + page);
    return finished ? 0 : 719;  // cudaErrorLaunchFailure
}

}  // namespace emulator

const char* mpsearch_error(int) {
    return "threads wait for one another forever";
}

int mpsearch_count_devices(int* count) {
    *count = 1;
    return 0;
}

int64_t mpsearch_arguments_bytes() {
    return mpsearch::kArgumentsBytes;
}

int mpsearch_use_device(int) {
    return 0;
}

// The order of threads between barriers: as they are numbered (0), or shuffled.
MPSEARCH_API void mpsearch_schedule(unsigned seed) {
    emulator::seed = seed;
}

MPSEARCH_API uint8_t* mpsearch_guarded(int64_t bytes) {
    return emulator::guarded(static_cast<size_t>(bytes));
}

namespace {

void wait_for_others(bool all) {
    if (all || threadIdx.x != 7) mpsearch::cuda::sync_block();
}

}  // namespace

// A kernel of which thread 7 misses the barrier unless `all`.
MPSEARCH_API int mpsearch_broken_kernel(int all) {
    return mpsearch::cuda::launch<bool>(wait_for_others, 2, 64, 0, 0, all != 0);
}
