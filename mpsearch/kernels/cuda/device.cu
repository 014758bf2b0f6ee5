// The library's own words with the driver: how many GPUs there are, which one is used, what an error means.
#include <cuda_runtime.h>

#include "api.h"

const char* mpsearch_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int mpsearch_count_devices(int* count) {
    return cudaGetDeviceCount(count);
}

int mpsearch_use_device(int device) {
    return cudaSetDevice(device);
}

int64_t mpsearch_arguments_bytes() {
    return mpsearch::kArgumentsBytes;
}
