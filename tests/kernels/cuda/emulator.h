// Runs CUDA kernels on the host: each thread of a block is a fiber, blocks run one after another.
//
// What it holds kernels to: a barrier that not all threads reach, or a warp operation that not all its lanes reach, is an
// error and not a hang; a copy in the background arrives only when it is waited for; shared memory begins as rubbish and
// ends at a page that must not be touched, as does memory from `mpsearch_guarded`; fibers between two barriers run in the
// order of `mpsearch_schedule`, so that a missing barrier shows as a result that depends on it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __launch_bounds__(...)

struct Coordinate {
    unsigned x = 0;
};
inline Coordinate threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kLanes = 32;
inline int current;    // thread of the block
inline unsigned seed;  // of the order of threads; 0: as they are numbered

uint8_t* guarded(size_t bytes);
uint8_t* shared_memory();
void sync_block();
void sync_warp();
void* warp_slots(size_t bytes);  // where the lanes of a warp leave what they exchange
void copy_later(void* to, const void* from, size_t bytes);
void end_copy_group();
void wait_for_copies(size_t left);

// kernel(job) in every thread; 0, or cudaErrorLaunchFailure where threads wait for one another forever.
int run(int64_t grid, int threads, int64_t shared_bytes, void (*kernel)(const void*), const void* job);

inline int lane() {
    return current % kLanes;
}

// Every lane gives a value; `read` makes the lane's result of all 32.
template <class T, class Read>
T exchange(const T& value, Read read) {
    T* all = static_cast<T*>(warp_slots(sizeof(T) * kLanes));
    memcpy(all + lane(), &value, sizeof(T));
    sync_warp();
    const T result = read(all);
    sync_warp();
    return result;
}

}  // namespace emulator
