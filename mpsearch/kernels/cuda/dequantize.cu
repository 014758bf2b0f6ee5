// A packed weight from its streaming layout as a plain matrix, for products with so many tokens that cuBLAS is faster.
//
//     weight[r, c] = (code - zero) * scale, rounded to float32 and from there to the dtype
//
// A thread handles what a lane of the products would: 4 rows of a block of 32 columns, 128 weights. Bytes moved per weight:
// bits / 8 read, 2 or 4 written. Bound: memory.
#include "api.h"
#include "stream.cuh"

namespace mpsearch::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 4;  // of a thread

struct DequantizeJob {
    Stream stream;
    void* weight;
    int dtype;
};

template <int bits>
__global__ void __launch_bounds__(kThreads) dequantize_blocks(const DequantizeJob job) {
    const Stream& stream = job.stream;
    const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t parts = stream.n_tiles * (kTileRows / kRows);
    const int64_t part = number / stream.n_blocks;  // of the rows; neighbouring threads take blocks of the same rows
    const int block = static_cast<int>(number % stream.n_blocks);
    if (part >= parts) return;
    const int group = block / stream.group_blocks, in_group = block % stream.group_blocks * kBlockColumns;
    const int64_t column = group * stream.group_size + in_group;
    const int64_t of_group = stream.group_size - in_group, of_row = stream.columns - column;
    const int64_t left = of_group < of_row ? of_group : of_row, n = left < kBlockColumns ? left : kBlockColumns;
    const uint8_t* record = record_of(stream, part * kRows / kTileRows, group);
    const int64_t first = part * kRows % kTileRows;
    const uint8_t* codes =
        record + stream.header_bytes + in_group / kBlockColumns * int64_t{bits * kQuadBytes} + first * 4;
    Bytes16 packed[bits];
#pragma unroll
    for (int i = 0; i < bits; ++i) packed[i] = *reinterpret_cast<const Bytes16*>(codes + i * kQuadBytes);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t row = part * kRows + r;
        if (row >= stream.rows) break;
        uint32_t words[bits], quads[kQuads];
#pragma unroll
        for (int i = 0; i < bits; ++i) words[i] = packed[i].word[r];
        unpack_words<bits, false>(words, quads);
        const float scale = stream.half_scales ? float_from_half(reinterpret_cast<const uint16_t*>(record)[first + r])
                                               : reinterpret_cast<const float*>(record)[first + r];
        const float zero =
            0.5f * static_cast<float>(reinterpret_cast<const int16_t*>(record + stream.header_bytes / 2)[first + r]);
        const int64_t to = row * stream.columns + column;
        const auto value = [&](int c) {
            return (static_cast<float>(quads[c / 4] >> 8 * (c % 4) & 255) - zero) * scale;
        };
        const auto half = [&](int c) -> uint32_t {
            return job.dtype == kFloat16 ? half_from_float(value(c)) : bfloat_from_float(value(c));
        };
        if (job.dtype == kFloat32) {
            float* weight = static_cast<float*>(job.weight) + to;
            if (n == kBlockColumns && reinterpret_cast<uintptr_t>(weight) % 16 == 0) {
#pragma unroll
                for (int c = 0; c < kBlockColumns; c += 4)
                    *reinterpret_cast<Bytes16*>(weight + c) = Bytes16{
                        {bits_of(value(c)), bits_of(value(c + 1)), bits_of(value(c + 2)), bits_of(value(c + 3))}};
            } else {
#pragma unroll
                for (int c = 0; c < kBlockColumns; ++c)
                    if (c < n) weight[c] = value(c);
            }
        } else {
            uint16_t* weight = static_cast<uint16_t*>(job.weight) + to;
            if (n == kBlockColumns && reinterpret_cast<uintptr_t>(weight) % 16 == 0) {
#pragma unroll
                for (int c = 0; c < kBlockColumns; c += 8)
                    *reinterpret_cast<Bytes16*>(weight + c) =
                        Bytes16{{half(c) | half(c + 1) << 16, half(c + 2) | half(c + 3) << 16,
                                 half(c + 4) | half(c + 5) << 16, half(c + 6) | half(c + 7) << 16}};
            } else {
#pragma unroll
                for (int c = 0; c < kBlockColumns; ++c)
                    if (c < n) weight[c] = static_cast<uint16_t>(half(c));
            }
        }
    }
}

template <int bits>
int dequantize(const DequantizeJob& job, uintptr_t stream) {
    const int64_t n_threads = job.stream.n_tiles * (kTileRows / kRows) * job.stream.n_blocks;
    return launch(dequantize_blocks<bits>, (n_threads + kThreads - 1) / kThreads, kThreads, 0, stream, job);
}

}  // namespace
}  // namespace mpsearch::cuda

using namespace mpsearch::cuda;

int mpsearch_dequantize_stream(const mpsearch::StreamArguments* arguments, uintptr_t stream) {
    const DequantizeJob job{
        .stream = make_stream(arguments->packed, arguments->format),
        .weight = arguments->weight,
        .dtype = arguments->dtype,
    };
    constexpr decltype(&dequantize<1>) widths[] = {dequantize<1>, dequantize<2>, dequantize<3>, dequantize<4>,
                                                   dequantize<5>, dequantize<6>, dequantize<7>, dequantize<8>};
    return widths[arguments->format.bits - 1](job, stream);
}
