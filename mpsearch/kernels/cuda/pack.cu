// Packed codes: code i <-> bits [i * bits, (i + 1) * bits) of a dense little-endian stream, and what they stand for.
//
//     weight = (code - zero) * scale, one rounding
//
// A thread handles 8 codes, which are `bits` whole bytes, moved within one 64-bit word in three halving steps. Bytes moved per
// code: bits / 8 and 1 (codes) or 4 (floats). Bound: memory; the narrow accesses of neighbouring threads meet in the first
// cache.
#include "api.h"
#include "ptx.cuh"

namespace mpsearch::cuda {
namespace {

constexpr int kThreads = 256;

struct PackJob {
    const uint8_t* from;
    uint8_t* to;
    int* seen;
    int64_t numel;
    int bits;
};

struct DequantizeJob {
    const uint8_t* packed;
    const void* scales;
    const uint8_t* zero_points;
    float* weight;
    int64_t numel, columns, group_size, n_groups;
    int bits;
    float middle;
    bool half_scales;
};

// Every other field of 2^i * bits bits moves to its neighbour, or away from it to the middle of the two.
MPSEARCH_DEVICE uint64_t compress(uint64_t codes, int bits) {
    for (int field = 8, width = bits; field < 64; field *= 2, width *= 2) {
        uint64_t together = 0;
        for (int at = 0, to = 0; at < 64; at += 2 * field, to += 2 * field) {
            const uint64_t mask = width == 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
            together |= (codes >> at & mask) << to | (codes >> (at + field) & mask) << (to + width);
        }
        codes = together;
    }
    return codes;
}

MPSEARCH_DEVICE uint64_t load_bytes(const uint8_t* from, int64_t n) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i)
        if (i < n) word |= uint64_t{from[i]} << 8 * i;
    return word;
}
MPSEARCH_DEVICE void store_bytes(uint64_t word, uint8_t* to, int64_t n) {
    for (int i = 0; i < 8; ++i)
        if (i < n) to[i] = static_cast<uint8_t>(word >> 8 * i);
}

MPSEARCH_DEVICE int64_t thread_number() {
    return int64_t{blockIdx.x} * kThreads + threadIdx.x;
}

__global__ void pack_kernel(const PackJob job) {
    const int64_t at = 8 * thread_number(), n = job.numel - at < 8 ? job.numel - at : 8;
    uint32_t seen = 0;
    if (n > 0) {
        const uint64_t codes = n == 8 && reinterpret_cast<uintptr_t>(job.from) % 8 == 0
                                   ? *reinterpret_cast<const uint64_t*>(job.from + at)
                                   : load_bytes(job.from + at, n);
        store_bytes(compress(codes, job.bits), job.to + at / 8 * job.bits, (n * job.bits + 7) / 8);
        seen = static_cast<uint32_t>(codes | codes >> 32);
    }
    seen |= seen >> 16;
    seen |= seen >> 8;
    for (int mask = kWarp / 2; mask > 0; mask /= 2) seen |= shuffle_xor(seen, mask);
    if (threadIdx.x % kWarp == 0 && (seen & 255)) atomic_or(job.seen, static_cast<int>(seen & 255));
}

__global__ void unpack_kernel(const PackJob job) {
    const int64_t at = 8 * thread_number(), n = job.numel - at < 8 ? job.numel - at : 8;
    if (n <= 0) return;
    const uint64_t word = load_bytes(job.from + at / 8 * job.bits, (n * job.bits + 7) / 8);
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) codes |= (word >> i * job.bits & ((1u << job.bits) - 1)) << 8 * i;
    if (n == 8 && reinterpret_cast<uintptr_t>(job.to) % 8 == 0)
        *reinterpret_cast<uint64_t*>(job.to + at) = codes;
    else
        store_bytes(codes, job.to + at, n);
}

__global__ void dequantize_kernel(const DequantizeJob job) {
    const int64_t at = 8 * thread_number(), n = job.numel - at < 8 ? job.numel - at : 8;
    if (n <= 0) return;
    const uint64_t word = load_bytes(job.packed + at / 8 * job.bits, (n * job.bits + 7) / 8);
    int64_t row = at / job.columns, column = at % job.columns, group = -1;
    float scale = 0, zero = job.middle, values[8];
    for (int i = 0; i < 8; ++i) {
        values[i] = 0;
        if (i >= n) continue;
        const int64_t here = row * job.n_groups + column / job.group_size;
        if (here != group) {
            group = here;
            scale = job.half_scales ? float_from_half(static_cast<const uint16_t*>(job.scales)[group])
                                    : static_cast<const float*>(job.scales)[group];
            if (job.zero_points) zero = static_cast<float>(job.zero_points[group]);
        }
        const auto code = static_cast<uint32_t>(word >> i * job.bits) & ((1u << job.bits) - 1);
        values[i] = (static_cast<float>(code) - zero) * scale;
        if (++column == job.columns) {
            column = 0;
            ++row;
        }
    }
    if (n == 8 && reinterpret_cast<uintptr_t>(job.weight) % 16 == 0) {
        for (int i = 0; i < 8; i += 4) {
            const Bytes16 four = {
                {bits_of(values[i]), bits_of(values[i + 1]), bits_of(values[i + 2]), bits_of(values[i + 3])}};
            *reinterpret_cast<Bytes16*>(job.weight + at + i) = four;
        }
    } else {
        for (int i = 0; i < n; ++i) job.weight[at + i] = values[i];
    }
}

template <class Job>
int launch_eights(void (*kernel)(Job), int64_t numel, uintptr_t stream, const Job& job) {
    return launch(kernel, (numel + 8 * kThreads - 1) / (8 * kThreads), kThreads, 0, stream, job);
}

}  // namespace
}  // namespace mpsearch::cuda

using namespace mpsearch::cuda;

int mpsearch_pack(const uint8_t* codes, uint8_t* packed, int* seen, int64_t numel, int bits, uintptr_t stream) {
    return launch_eights(pack_kernel, numel, stream, PackJob{codes, packed, seen, numel, bits});
}

int mpsearch_unpack(const uint8_t* packed, uint8_t* codes, int64_t numel, int bits, uintptr_t stream) {
    return launch_eights(unpack_kernel, numel, stream, PackJob{packed, codes, nullptr, numel, bits});
}

int mpsearch_dequantize(const uint8_t* packed,
                        const void* scales,
                        const uint8_t* zero_points,
                        float* weight,
                        int64_t rows,
                        int64_t columns,
                        int64_t group_size,
                        int bits,
                        int half_scales,
                        uintptr_t stream) {
    const float middle = bits == 1 ? 0.5f : static_cast<float>(1 << (bits - 1));
    const int64_t n_groups = (columns + group_size - 1) / group_size, numel = rows * columns;
    const DequantizeJob job{packed,     scales,   zero_points, weight, numel,           columns,
                            group_size, n_groups, bits,        middle, half_scales != 0};
    return launch_eights(dequantize_kernel, numel, stream, job);
}
