// What the emulated library has in place of device.cu, and what tests ask of the emulator.
#include "../../../mpsearch/kernels/cuda/api.h"
#include "../../../mpsearch/kernels/cuda/ptx.cuh"

const char* mpsearch_error(int) {
    return "threads wait for one another forever";
}

int mpsearch_count_devices(int* count) {
    *count = 1;
    return 0;
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
