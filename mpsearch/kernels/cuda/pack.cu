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

__global__ void pack_kernel(const PackArguments job) {
    const int64_t at = 8 * thread_number(), n = job.numel - at < 8 ? job.numel - at : 8;
    uint32_t seen = 0;
    if (n > 0) {
        const uint64_t codes = n == 8 && reinterpret_cast<uintptr_t>(job.source) % 8 == 0
                                   ? *reinterpret_cast<const uint64_t*>(job.source + at)
                                   : load_bytes(job.source + at, n);
        store_bytes(compress(codes, job.bits), job.target + at / 8 * job.bits, (n * job.bits + 7) / 8);
        seen = static_cast<uint32_t>(codes | codes >> 32);
    }
    seen |= seen >> 16;
    seen |= seen >> 8;
    for (int mask = kWarp / 2; mask > 0; mask /= 2) seen |= shuffle_xor(seen, mask);
    if (threadIdx.x % kWarp == 0 && (seen & 255)) atomic_or(job.seen, static_cast<int>(seen & 255));
}

__global__ void unpack_kernel(const PackArguments job) {
    const int64_t at = 8 * thread_number(), n = job.numel - at < 8 ? job.numel - at : 8;
    if (n <= 0) return;
    const uint64_t word = load_bytes(job.source + at / 8 * job.bits, (n * job.bits + 7) / 8);
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) codes |= (word >> i * job.bits & ((1u << job.bits) - 1)) << 8 * i;
    if (n == 8 && reinterpret_cast<uintptr_t>(job.target) % 8 == 0)
        *reinterpret_cast<uint64_t*>(job.target + at) = codes;
    else
        store_bytes(codes, job.target + at, n);
}

__global__ void dequantize_kernel(const DequantizeArguments job) {
    const int64_t at = 8 * thread_number(), left = job.rows * job.columns - at, n = left < 8 ? left : 8;
    if (n <= 0) return;
    const uint64_t word = load_bytes(job.packed + at / 8 * job.bits, (n * job.bits + 7) / 8);
    int64_t row = at / job.columns, column = at % job.columns, group = -1;
    float scale = 0, zero = job.bits == 1 ? 0.5f : static_cast<float>(1 << (job.bits - 1)), values[8];
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

int mpsearch_pack(const mpsearch::PackArguments* arguments, uintptr_t stream) {
    return launch_eights(pack_kernel, arguments->numel, stream, *arguments);
}

int mpsearch_unpack(const mpsearch::PackArguments* arguments, uintptr_t stream) {
    return launch_eights(unpack_kernel, arguments->numel, stream, *arguments);
}

int mpsearch_dequantize(const mpsearch::DequantizeArguments* arguments, uintptr_t stream) {
    return launch_eights(dequantize_kernel, arguments->rows * arguments->columns, stream, *arguments);
}
