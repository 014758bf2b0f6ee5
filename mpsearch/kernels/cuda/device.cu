// The library's own words with the driver: how many GPUs there are, which one is used, what an error means.
#include "api.h"
#include "ptx.cuh"

#if defined(__CUDACC__)

const char* mpsearch_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int mpsearch_count_devices(int* count) {
    return cudaGetDeviceCount(count);
}

int mpsearch_use_device(int device) {
    return cudaSetDevice(device);
}

#else

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

MPSEARCH_API void mpsearch_schedule(unsigned seed) {
    emulator::seed = seed;
}

MPSEARCH_API uint8_t* mpsearch_guarded(int64_t bytes) {
    return emulator::guarded(static_cast<size_t>(bytes));
}

#endif
