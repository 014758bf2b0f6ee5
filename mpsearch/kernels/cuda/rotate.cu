// Rotates tokens by a Hadamard matrix of signs, as cpu/rotate.cpp: y = (x * factors) H, or (x H) * factors, bit for bit.
//
// A block of threads handles one row, one power of two of columns after the other, in shared memory; a thread takes eight
// values at a time through three stages in registers. A gap after each 32 values keeps the lanes of a warp in different
// banks. Bytes moved: each value once from x and once to y. Bound: memory; with few rows latency, a barrier for three stages.
#include "api.h"
#include "ptx.cuh"

namespace mpsearch::cuda {
namespace {

constexpr int kThreads = 128;

MPSEARCH_DEVICE float load_float(const void* x, int dtype, int64_t at) {
    if (dtype == kFloat32) return static_cast<const float*>(x)[at];
    const uint16_t bits = static_cast<const uint16_t*>(x)[at];
    return dtype == kFloat16 ? float_from_half(bits) : float_of(uint32_t{bits} << 16);
}
MPSEARCH_DEVICE void store_float(float value, void* y, int dtype, int64_t at) {
    if (dtype == kFloat32)
        static_cast<float*>(y)[at] = value;
    else
        static_cast<uint16_t*>(y)[at] = dtype == kFloat16 ? half_from_float(value) : bfloat_from_float(value);
}

MPSEARCH_HOST_DEVICE int place(int i) {
    return i + i / kWarp;
}

// The stages of `apart` and of its multiples by powers of two below `count`, of n values in shared memory.
template <int count>
MPSEARCH_DEVICE void stages(float* values, int n, int apart) {
    for (int i = static_cast<int>(threadIdx.x); i < n / count; i += kThreads) {
        const int first = i / apart * (apart * count) + i % apart;
        float v[count];
#pragma unroll
        for (int k = 0; k < count; ++k) v[k] = values[place(first + k * apart)];
#pragma unroll
        for (int step = 1; step < count; step *= 2)
#pragma unroll
            for (int k = 0; k < count; ++k)
                if (!(k & step)) {
                    const float a = v[k], b = v[k + step];
                    v[k] = a + b, v[k + step] = a - b;
                }
#pragma unroll
        for (int k = 0; k < count; ++k) values[place(first + k * apart)] = v[k];
    }
}

__global__ void __launch_bounds__(kThreads) rotate_rows(const RotateArguments job) {
    float* values = reinterpret_cast<float*>(shared_memory());
    const int64_t row = int64_t{blockIdx.x} * job.columns;
    int64_t largest = 1;
    while (2 * largest <= job.columns) largest *= 2;
    int64_t at = 0;
    for (int64_t size = largest; at < job.columns; size /= 2) {
        if (size > job.columns - at) continue;
        const int n = static_cast<int>(size);
        for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
            const float x = load_float(job.x, job.dtype, row + at + i);
            values[place(i)] = job.back ? x : x * job.factors[at + i];
        }
        sync_block();
        for (int apart = 1; apart < n;) {
            const int left = n / apart, count = left < 8 ? left : 8;
            if (count == 8)
                stages<8>(values, n, apart);
            else if (count == 4)
                stages<4>(values, n, apart);
            else
                stages<2>(values, n, apart);
            apart *= count;
            sync_block();
        }
        for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
            const float y = values[place(i)];
            store_float(job.back ? y * job.factors[at + i] : y, job.y, job.dtype, row + at + i);
        }
        sync_block();
        at += n;
    }
}

}  // namespace
}  // namespace mpsearch::cuda

using namespace mpsearch::cuda;

int mpsearch_rotate(const mpsearch::RotateArguments* arguments, uintptr_t stream) {
    int64_t largest = 1;
    while (2 * largest <= arguments->columns) largest *= 2;
    const auto shared = static_cast<int64_t>(sizeof(float)) * place(static_cast<int>(largest));
    return launch(rotate_rows, arguments->rows, kThreads, shared, stream, *arguments);
}
