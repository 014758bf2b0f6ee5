// Every instruction that C++ has no word for, and the launch: the one file that knows whether a GPU or the emulator runs.
//
// Kernels are compiled by nvcc for a GPU, and by any C++20 compiler against tests/kernels/cuda/emulator.h, which runs each
// thread of a block as a fiber. Below, each function stands once for the device and once for the emulator, after the PTX
// manual: "lane" is the thread's place in its warp, and a fragment's element belongs to the lane that the manual says.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define MPSEARCH_DEVICE __device__ __forceinline__
#define MPSEARCH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include "emulator.h"
#define MPSEARCH_DEVICE inline
#define MPSEARCH_HOST_DEVICE inline
#endif

namespace mpsearch::cuda {

constexpr int kWarp = 32;

#if defined(__CUDACC__)

MPSEARCH_DEVICE uint32_t bits_of(float value) {
    return __float_as_uint(value);
}
MPSEARCH_DEVICE float float_of(uint32_t bits) {
    return __uint_as_float(bits);
}

MPSEARCH_DEVICE uint8_t* shared_memory() {
    extern __shared__ __align__(16) uint8_t memory[];
    return memory;
}

MPSEARCH_DEVICE void sync_block() {
    __syncthreads();
}

// The value of `lane`, and of the lane whose number differs in the bits of `mask`; all lanes of the warp call.
template <class T>
MPSEARCH_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
MPSEARCH_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

MPSEARCH_DEVICE void atomic_or(int* to, int value) {
    atomicOr(to, value);
}

// Byte i of the result is byte `selector >> 4 * i & 7` of the eight bytes b:a.
MPSEARCH_DEVICE uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

MPSEARCH_DEVICE uint16_t half_from_float(float value) {
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
MPSEARCH_DEVICE float float_from_half(uint16_t half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
MPSEARCH_DEVICE uint16_t bfloat_from_float(float value) {
    uint16_t bfloat;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat) : "f"(value));
    return bfloat;
}

// Two float16: a - b. Two bfloat16: a + b.
MPSEARCH_DEVICE uint32_t subtract_half2(uint32_t a, uint32_t b) {
    uint32_t difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}
MPSEARCH_DEVICE uint32_t add_bfloat2(uint32_t a, uint32_t b) {
    uint32_t sum;  // sm_80 has no addition of its own, so 1 * a + b
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return sum;
}

// c += a b, with a [16, 16] and b [16, 8] of 16 bits, or a [16, 32] of uint8 and b [32, 8] of int8. With lane = 4 g + t:
// a's registers are rows g, g + 8, g, g + 8, the last two in the further half of the columns; columns 2t and 2t + 1 (4t to
// 4t + 3 of bytes) of each half. b's are the same columns of both halves, for column g of the result. c's are (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
MPSEARCH_DEVICE void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MPSEARCH_DEVICE void multiply_bfloat(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MPSEARCH_DEVICE void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies to shared memory that go on in the background: a thread's own, in groups; `wait_for_copies<n>` returns when all
// but the thread's last n groups have arrived. 16 bytes go past the first cache, 8 through it (four lanes share them).
MPSEARCH_DEVICE void copy_async_16(void* to, const void* from) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
MPSEARCH_DEVICE void copy_async_8(void* to, const void* from) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
}
MPSEARCH_DEVICE void end_copy_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int n>
MPSEARCH_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Bytes of shared memory that a block may have on the current device.
inline int64_t most_shared_bytes() {
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

// grid blocks of `threads` threads with `shared` bytes; 0 or a cudaError_t.
template <class Job>
int launch(void (*kernel)(Job), int64_t grid, int threads, int64_t shared, uintptr_t stream, const Job& job) {
    if (grid <= 0) return cudaSuccess;
    if (grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
    if (shared > 48 << 10) {  // beyond that a kernel must be allowed to
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, job);
}

#else

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
inline uint8_t* shared_memory() {
    return emulator::shared_memory();
}
inline void sync_block() {
    emulator::sync_block();
}
template <class T>
T shuffle(T value, int lane) {
    static_assert(sizeof(T) == 4);
    return emulator::exchange<T>(value, [&](const T* values) { return values[lane]; });
}
template <class T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, emulator::lane() ^ mask);
}
inline void atomic_or(int* to, int value) {
    *to |= value;
}
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
inline uint16_t half_from_float(float value) {
    const auto half = static_cast<_Float16>(value);
    uint16_t bits;
    memcpy(&bits, &half, sizeof(bits));
    return bits;
}
inline float float_from_half(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, sizeof(half));
    return static_cast<float>(half);
}
inline uint16_t bfloat_from_float(float value) {
    if (value != value) return 0x7fff;
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint32_t subtract_half2(uint32_t a, uint32_t b) {
    const auto part = [](uint32_t pair, int i) { return float_from_half(static_cast<uint16_t>(pair >> 16 * i)); };
    return half_from_float(part(a, 0) - part(b, 0)) | uint32_t{half_from_float(part(a, 1) - part(b, 1))} << 16;
}
inline uint32_t add_bfloat2(uint32_t a, uint32_t b) {
    const float low = float_of(a << 16) + float_of(b << 16);
    const float high = float_of(a & 0xffff0000u) + float_of(b & 0xffff0000u);
    return bfloat_from_float(low) | uint32_t{bfloat_from_float(high)} << 16;
}

// The fragments of the 32 lanes as matrices, multiplied.
template <class Sum, int bytes, class A, class B>
void multiply_fragments(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, A a_value, B b_value) {
    struct Fragments {
        Sum c[4];
        uint32_t a[4], b[2];
    };
    Fragments mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    mine = emulator::exchange<Fragments>(mine, [&](const Fragments* all) {
        constexpr int each = 4 / bytes;  // elements in a register
        const int g = emulator::lane() / 4, t = emulator::lane() % 4;
        Fragments result = all[emulator::lane()];
        for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
            double sum = static_cast<double>(result.c[i]);
            for (int half = 0; half < 2; ++half)
                for (int k = 0; k < 4 * each; ++k) {
                    const uint32_t left = all[row % 8 * 4 + k / each].a[2 * half + row / 8];
                    const uint32_t right = all[column * 4 + k / each].b[half];
                    sum += a_value(left >> 8 * bytes * (k % each)) * b_value(right >> 8 * bytes * (k % each));
                }
            result.c[i] = static_cast<Sum>(sum);
        }
        return result;
    });
    memcpy(c, mine.c, sizeof(c));
}
inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto value = [](uint32_t bits) { return double{float_from_half(static_cast<uint16_t>(bits))}; };
    multiply_fragments<float, 2>(c, a, b0, b1, value, value);
}
inline void multiply_bfloat(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto value = [](uint32_t bits) { return double{float_of(bits << 16)}; };
    multiply_fragments<float, 2>(c, a, b0, b1, value, value);
}
inline void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_fragments<int32_t, 1>(
        c, a, b0, b1, [](uint32_t bits) { return double(static_cast<uint8_t>(bits)); },
        [](uint32_t bits) { return double(static_cast<int8_t>(bits)); });
}

inline void copy_async_16(void* to, const void* from) {
    emulator::copy_later(to, from, 16);
}
inline void copy_async_8(void* to, const void* from) {
    emulator::copy_later(to, from, 8);
}
inline void end_copy_group() {
    emulator::end_copy_group();
}
template <int n>
void wait_for_copies() {
    emulator::wait_for_copies(n);
}

inline int64_t most_shared_bytes() {
    return 99 << 10;  // the least of the GPUs of compute capability 8 and above
}

template <class Job>
int launch(void (*kernel)(Job), int64_t grid, int threads, int64_t shared, uintptr_t, const Job& job) {
    if (shared > most_shared_bytes()) return 1;  // cudaErrorInvalidValue
    struct Call {
        void (*kernel)(Job);
        const Job& job;
    };
    const Call call{kernel, job};
    const auto run = [](const void* of) { static_cast<const Call*>(of)->kernel(static_cast<const Call*>(of)->job); };
    return emulator::run(grid, threads, shared, run, &call);
}

#endif

// 16 bytes, of which the address is a multiple of 16.
struct alignas(16) Bytes16 {
    uint32_t word[4];
};

}  // namespace mpsearch::cuda
