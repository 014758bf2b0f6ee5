// Stages x for the products; stage.cuh has the formulas and the layout.
//
// A block of threads handles one column n of the fragments: all chunks of it (int8, where the token's scale must be known
// first) or a share of them (floats). A thread writes 16 bytes at a time. Bytes moved per value: 2 to 4 read, and read again
// for int8; 1 to 6 written. Bound: latency; x is small compared with the weight.
#include "api.h"
#include "stage.cuh"

namespace mpsearch::cuda {
namespace {

constexpr int kThreads = 256;

MPSEARCH_DEVICE float load_float(const void* x, int dtype, int64_t at) {
    if (dtype == kFloat32) return static_cast<const float*>(x)[at];
    const uint16_t bits = static_cast<const uint16_t*>(x)[at];
    return dtype == kFloat16 ? float_from_half(bits) : float_of(uint32_t{bits} << 16);
}

// Where a column's chunk goes and which of x's columns it holds: `n` from `column`, 0 where all of it is padding.
struct Chunk {
    uint8_t* to;
    int64_t column;
    int n;
};
template <int chunks>
MPSEARCH_DEVICE Chunk chunk_of(const StageJob& job, int column_of_result, int index) {
    constexpr int each = kBlockColumns / chunks;
    const int chunk = index % chunks, t = index / chunks % kStepBlocks, step = index / (chunks * kStepBlocks);
    const int tile = column_of_result / 8, lane = column_of_result % 8 * 4 + t;
    const Stream& stream = job.stream;
    const Place place = place_of(stream, step, t);
    const int first = place.block * kBlockColumns + chunk * each;  // column of the group
    const int64_t column = place.group * stream.group_size + first;
    int64_t n =
        stream.group_size - first < stream.columns - column ? stream.group_size - first : stream.columns - column;
    const int step_class = stream.classes == 1 ? 0 : t / stream.group_blocks;
    const bool there = place.there && column_of_result / stream.classes < job.n_tokens * job.parts &&
                       step_class == column_of_result % stream.classes;
    n = there && n > 0 ? (n < each ? n : each) : 0;
    const int64_t at = ((int64_t{step} * job.n_tiles + tile) * chunks + chunk) * kWarp + lane;
    return {job.staged + 16 * at, column, static_cast<int>(n)};
}

__global__ void stage_floats_kernel(const StageJob job) {
    const int column = static_cast<int>(blockIdx.x / job.n_blocks_each);
    const int share = static_cast<int>(blockIdx.x % job.n_blocks_each);
    const int token = column / job.stream.classes / job.parts, part = column / job.stream.classes % job.parts;
    const int n_chunks = job.stream.n_steps * kStepBlocks * 4;
    for (int i = share * kThreads + static_cast<int>(threadIdx.x); i < n_chunks; i += kThreads * job.n_blocks_each) {
        const Chunk chunk = chunk_of<4>(job, column, i);
        Bytes16 values = {};
        const int64_t begin = token * job.stream.columns + chunk.column;
        const auto* halves = static_cast<const uint16_t*>(job.x) + begin;
        if (job.dtype == kFloat32) {
            for (int k = 0; k < chunk.n; ++k) {
                float value = static_cast<const float*>(job.x)[begin + k];
                for (int p = 0; p < part; ++p) value -= float_of(bits_of(value) & 0xffff0000u);  // exact
                values.word[k / 2] |= bits_of(value) >> 16 << 16 * (k % 2);
            }
        } else if (chunk.n == 8 && reinterpret_cast<uintptr_t>(halves) % 16 == 0) {
            values = *reinterpret_cast<const Bytes16*>(halves);
        } else {
            for (int k = 0; k < chunk.n; ++k) values.word[k / 2] |= uint32_t{halves[k]} << 16 * (k % 2);
        }
        *reinterpret_cast<Bytes16*>(chunk.to) = values;
    }
}

MPSEARCH_DEVICE int quantize_value(float x, const InputGrid& grid) {
    const float at = x * grid.inverse;
    const float clamped = at > grid.least ? (at < grid.most ? at : grid.most) : grid.least;
    const int bits = static_cast<int>(bits_of(clamped + 12582912.0f));  // 1.5 * 2^23 + x: the low byte is the code
    return (bits + grid.shift) & 0xff;
}

__global__ void stage_int8_kernel(const StageJob job) {
    const Stream& stream = job.stream;
    const int column = static_cast<int>(blockIdx.x), token = column / stream.classes;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, n_warps = kThreads / kWarp;
    const int64_t row = int64_t{token} * stream.columns;
    InputGrid grid{};
    if (token < job.n_tokens) {
        float low = 0, high = 0, poison = 0;
        for (int64_t i = thread; i < stream.columns; i += kThreads) {
            const float value = load_float(job.x, job.dtype, row + i);
            low = fminf(low, value);
            high = fmaxf(high, value);
            poison += value - value;
        }
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            low = fminf(low, shuffle_xor(low, mask));
            high = fmaxf(high, shuffle_xor(high, mask));
            poison += shuffle_xor(poison, mask);
        }
        float* of_warps = reinterpret_cast<float*>(shared_memory());
        if (thread % kWarp == 0) {
            of_warps[3 * warp] = low;
            of_warps[3 * warp + 1] = high;
            of_warps[3 * warp + 2] = poison;
        }
        sync_block();
        low = high = poison = 0;
        for (int i = 0; i < n_warps; ++i) {
            low = fminf(low, of_warps[3 * i]);
            high = fmaxf(high, of_warps[3 * i + 1]);
            poison += of_warps[3 * i + 2];
        }
        grid = input_grid(job.input, low + poison, high);
    }
    for (int i = thread; i < stream.n_steps * kStepBlocks * 2; i += kThreads) {
        const Chunk chunk = chunk_of<2>(job, column, i);
        Bytes16 values = {};
        for (int k = 0; k < chunk.n; ++k) {
            const int code = quantize_value(load_float(job.x, job.dtype, row + chunk.column + k), grid);
            values.word[k / 4] |= static_cast<uint32_t>(code) << 8 * (k % 4);
        }
        *reinterpret_cast<Bytes16*>(chunk.to) = values;
    }
    if (token >= job.n_tokens || column % stream.classes != 0) return;
    if (thread == 0) job.token_scales[token] = grid.scale;
    for (int group = warp; group < stream.n_groups; group += n_warps) {
        const int64_t begin = group * stream.group_size, left = stream.columns - begin;
        const int64_t n = left < stream.group_size ? left : stream.group_size;
        int sum = 0;
        for (int64_t i = thread % kWarp; i < n; i += kWarp)
            sum += static_cast<int8_t>(quantize_value(load_float(job.x, job.dtype, row + begin + i), grid));
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (thread % kWarp == 0) job.token_sums[int64_t{token} * stream.n_groups + group] = sum;
    }
}

}  // namespace

int stage_floats(const StageJob& job, uintptr_t stream) {
    StageJob of = job;
    const int n_chunks = job.stream.n_steps * kStepBlocks * 4;
    of.n_blocks_each = (n_chunks + kThreads - 1) / kThreads;
    return launch(stage_floats_kernel, int64_t{8} * job.n_tiles * of.n_blocks_each, kThreads, 0, stream, of);
}

int stage_int8(const StageJob& job, uintptr_t stream) {
    return launch(stage_int8_kernel, int64_t{8} * job.n_tiles, kThreads, 12 * kThreads / kWarp, stream, job);
}

}  // namespace mpsearch::cuda
