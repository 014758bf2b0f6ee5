// Runs CUDA kernels on the host: each thread of a block is a fiber, blocks run one after another.
//
// What it holds kernels to: a barrier that not all threads reach, or a warp operation that not all its lanes reach, is an
// error and not a hang; a copy in the background arrives only when it is waited for; shared memory begins as rubbish and
// ends at a page that must not be touched, as does memory from `mpsearch_guarded`; fibers between two barriers run in the
// order of `mpsearch_schedule`, so that a missing barrier shows as a result that depends on it.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __launch_bounds__(...)

struct Coordinate {
    unsigned x = 0;
};
inline Coordinate threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kLanes = 32;
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

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Barrier> warps;
inline std::vector<std::vector<uint8_t>> slots;  // of a warp: what its lanes exchange
inline Barrier block;
inline int n_threads, current;
inline bool progress;
inline unsigned seed;  // 0: in order; else shuffled
inline uint8_t* shared;
inline jmp_buf scheduler;
inline std::function<void()> body;

// Memory that ends (but for its alignment to 16 bytes) where touching it is a fault.
inline uint8_t* guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page + page;
    auto* memory = static_cast<uint8_t*>(
        mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(memory + whole - page, page, PROT_NONE);
    memset(memory, 0xa5, whole - page);
    return memory + whole - page - (bytes + 15) / 16 * 16;
}

inline void yield() {
    if (!_setjmp(fibers[current]->at)) _longjmp(scheduler, 1);
}

inline void arrive(Barrier& barrier, int expected) {
    const uint64_t generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        progress = true;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline int lane() {
    return current % kLanes;
}

inline uint8_t* shared_memory() {
    return shared;
}

inline void sync_block() {
    arrive(block, n_threads);
}

// Every lane gives a value; `read` makes the lane's result of all 32.
template <class T, class Read>
T exchange(const T& value, Read read) {
    const int warp = current / kLanes;
    if (slots[warp].size() < sizeof(T) * kLanes) slots[warp].resize(sizeof(T) * kLanes);
    memcpy(slots[warp].data() + sizeof(T) * lane(), &value, sizeof(T));
    arrive(warps[warp], kLanes);
    const T result = read(reinterpret_cast<const T*>(slots[warp].data()));
    arrive(warps[warp], kLanes);
    return result;
}

inline void copy_later(void* to, const void* from, size_t bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) {
        fprintf(stderr, "a copy of %zu bytes is not aligned\n", bytes);
        abort();
    }
    fibers[current]->open.push_back({to, from, bytes});
}
inline void end_copy_group() {
    Fiber& fiber = *fibers[current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
inline void wait_for_copies(size_t left) {
    auto& groups = fibers[current]->groups;
    for (; groups.size() > left; groups.pop_front())
        for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
}

inline void run_fiber() {
    body();
    fibers[current]->done = true;
    progress = true;
    _longjmp(scheduler, 1);
}

// One block; false where its threads wait for one another forever.
inline bool run_block(std::mt19937& random) {
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

inline int run(int64_t grid, int threads, int64_t shared_bytes, std::function<void()> kernel) {
    while (fibers.size() < static_cast<size_t>(threads)) fibers.push_back(std::make_unique<Fiber>());
    body = std::move(kernel);
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
    munmap(reinterpret_cast<void*>(whole ? begin : begin), whole + page);
    return finished ? 0 : 719;  // cudaErrorLaunchFailure
}

}  // namespace emulator
