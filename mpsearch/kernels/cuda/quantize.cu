// Group-wise quantization, with an optional search over clip ratios.
//
//     symmetric    step = max|x| / max(2^(bits-1) - 1, 0.5)    zero = 2^(bits-1), at 1 bit 0.5
//     asymmetric   step = (high - low) / (2^bits - 1)          zero = rint(clamp(-(ratio * low) / scale))
//     scale = round(ratio * step)    code = rint(clamp(x / scale + zero))
//
// where 1 / scale is rounded before it multiplies and no operation is fused; reference.py has every rounding. The search
// takes the ratio with the least scale^2 * sum((code - (x / scale + zero))^2 * importance), the sum kept in eight parts
// (column j in part j % 8): eight lanes keep one part each.
//
// Short groups without a search: 4 weights a lane, a group in 4 to 32 lanes, several groups one after another so that their
// loads overlap; the weights stay in registers. Else: a warp a group, which is read once for its range, once (from the first
// cache) for each 8 ratios, and once for the result. Bytes moved per weight: 4 read, 1 written.
// Bound: without a search memory; with one arithmetic, 8 operations per column and ratio.
#include <algorithm>

#include "api.h"
#include "ptx.cuh"

namespace mpsearch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kSmallestNormal = 0x1p-126f;  // scales below it have no finite inverse: they count as 0
constexpr int kParts = 8;                     // of an error's sum
constexpr int kRatiosAtOnce = 2;              // whose errors a lane sums in one pass over the columns
constexpr int kGroupsAtOnce = 4;              // of short groups, for each lane

struct QuantizeJob : QuantizeArguments {
    int64_t n_all;             // groups in all rows
    float top, steps, middle;  // largest code; steps between 0 (or the lowest) and the highest; implied zero point
};

struct Grid {
    float scale, inverse, zero;
};

MPSEARCH_DEVICE float clamped(float position, float top) {
    return rintf(fminf(fmaxf(position, 0.0f), top)) + 0.0f;
}

MPSEARCH_DEVICE float step_of(const QuantizeJob& job, float low, float high) {
    return (job.symmetric ? fmaxf(-low, high) : high - low) / job.steps;
}

MPSEARCH_DEVICE Grid make_grid(const QuantizeJob& job, float step, float low, float ratio) {
    Grid grid;
    grid.scale = ratio * step;
    if (job.half_scales) grid.scale = float_from_half(half_from_float(grid.scale));
    const bool vanishes = fabsf(grid.scale) < kSmallestNormal;
    grid.inverse = vanishes ? 0.0f : 1.0f / grid.scale;
    grid.scale = vanishes ? 0.0f : grid.scale;
    grid.zero = job.symmetric ? job.middle : clamped(-(ratio * low) * grid.inverse, job.top);
    return grid;
}

MPSEARCH_DEVICE float code_of(const QuantizeJob& job, const Grid& grid, float x) {
    return clamped(x * grid.inverse + grid.zero, job.top);
}

MPSEARCH_DEVICE void store_grid(const QuantizeJob& job, const Grid& grid, int64_t group) {
    if (job.half_scales)
        static_cast<uint16_t*>(job.scales)[group] = half_from_float(grid.scale);
    else
        static_cast<float*>(job.scales)[group] = grid.scale;
    if (job.zero_points) job.zero_points[group] = static_cast<uint8_t>(grid.zero);
}

// `lanes` lanes a group of 4 * lanes weights, which lie one behind another.
template <int lanes>
__global__ void __launch_bounds__(kThreads) quantize_short(const QuantizeJob job) {
    constexpr int per_block = kThreads / lanes;
    const int lane = static_cast<int>(threadIdx.x) % lanes;
    const int64_t first = int64_t{blockIdx.x} * kGroupsAtOnce * per_block + threadIdx.x / lanes;
    float x[kGroupsAtOnce][4] = {};
#pragma unroll
    for (int i = 0; i < kGroupsAtOnce; ++i) {
        const int64_t group = first + i * per_block;
        if (group >= job.n_all) continue;
        const Bytes16 loaded = reinterpret_cast<const Bytes16*>(job.weight)[group * lanes + lane];
#pragma unroll
        for (int k = 0; k < 4; ++k) x[i][k] = float_of(loaded.word[k]);
    }
    float poison = 0;
#pragma unroll
    for (int i = 0; i < kGroupsAtOnce; ++i) {
        float low = 0, high = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            low = fminf(low, x[i][k]);
            high = fmaxf(high, x[i][k]);
            poison += x[i][k] - x[i][k];
        }
#pragma unroll
        for (int mask = lanes / 2; mask > 0; mask /= 2) {
            low = fminf(low, shuffle_xor(low, mask));
            high = fmaxf(high, shuffle_xor(high, mask));
        }
        const int64_t group = first + i * per_block;
        if (group >= job.n_all) continue;
        const Grid grid = make_grid(job, step_of(job, low, high), low, 1.0f);
        poison += grid.scale - grid.scale;
        if (lane == 0) store_grid(job, grid, group);
        uint32_t codes = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) codes |= static_cast<uint32_t>(code_of(job, grid, x[i][k])) << 8 * k;
        reinterpret_cast<uint32_t*>(job.codes)[group * lanes + lane] = codes;
    }
    if (!(poison == 0)) atomic_or(job.not_finite, 1);
}

// The ratio with the least error, of equals the first; the warp's lanes all get it. Lane 8 s + j keeps part j of the sums
// for ratios s, s + 4, s + 8, ...
MPSEARCH_DEVICE float best_ratio(
    const QuantizeJob& job, const float* x, const float* importance, int64_t n, float low, float high, int lane) {
    constexpr int kSets = kWarp / kParts;
    const float step = step_of(job, low, high), infinity = float_of(0x7f800000u);
    float least = infinity;
    int best = 0;
    for (int64_t begin = 0; begin < job.n_ratios; begin += kSets * kRatiosAtOnce) {
        Grid grids[kRatiosAtOnce];
        float sums[kRatiosAtOnce] = {};
        int64_t index[kRatiosAtOnce];
#pragma unroll
        for (int i = 0; i < kRatiosAtOnce; ++i) {
            index[i] = begin + i * kSets + lane / kParts;
            grids[i] = make_grid(job, step, low, job.ratios[index[i] < job.n_ratios ? index[i] : 0]);
        }
        for (int64_t column = lane % kParts; column < n; column += kParts) {
            const float value = x[column], counts = importance ? importance[column] : 1.0f;
#pragma unroll
            for (int i = 0; i < kRatiosAtOnce; ++i) {
                const float position = value * grids[i].inverse + grids[i].zero;
                const float off = clamped(position, job.top) - position;
                sums[i] = sums[i] + off * off * counts;
            }
        }
#pragma unroll
        for (int i = 0; i < kRatiosAtOnce; ++i) {
            for (int mask = 1; mask < kParts; mask *= 2) sums[i] = sums[i] + shuffle_xor(sums[i], mask);
            const float error =
                grids[i].scale == 0 ? infinity : (grids[i].scale * grids[i].scale) * sums[i];  // NaN is never less
            if (index[i] < job.n_ratios && error < least) {
                least = error;
                best = static_cast<int>(index[i]);
            }
        }
    }
    for (int mask = kParts; mask < kWarp; mask *= 2) {
        const float error = shuffle_xor(least, mask);
        const int other = shuffle_xor(best, mask);
        if (error < least || (error == least && other < best)) {
            least = error;
            best = other;
        }
    }
    return job.ratios[least < infinity ? best : 0];
}

// A warp a group, of any length and alignment.
__global__ void __launch_bounds__(kThreads) quantize_any(const QuantizeJob job) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t group = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (group >= job.n_all) return;  // the whole warp
    const int64_t row = group / job.n_groups, column = group % job.n_groups * job.group_size,
                  at = row * job.columns + column;
    const int64_t n = job.columns - column < job.group_size ? job.columns - column : job.group_size;
    const float* x = job.weight + at;
    float low = 0, high = 0, poison = 0;
#pragma unroll 4
    for (int64_t i = lane; i < n; i += kWarp) {
        const float value = x[i];
        low = fminf(low, value);
        high = fmaxf(high, value);
        poison += value - value;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        low = fminf(low, shuffle_xor(low, mask));
        high = fmaxf(high, shuffle_xor(high, mask));
    }
    float ratio = 1;
    if (job.ratios) {
        const float* importance =
            job.importance ? job.importance + row / job.rows_per_importance * job.columns + column : nullptr;
        ratio = best_ratio(job, x, importance, n, low, high, lane);
    }
    const Grid grid = make_grid(job, step_of(job, low, high), low, ratio);
    poison += grid.scale - grid.scale;
    if (lane == 0) store_grid(job, grid, group);
#pragma unroll 4
    for (int64_t i = lane; i < n; i += kWarp) job.codes[at + i] = static_cast<uint8_t>(code_of(job, grid, x[i]));
    if (!(poison == 0)) atomic_or(job.not_finite, 1);
}

template <int lanes>
int launch_short(const QuantizeJob& job, uintptr_t stream) {
    const int64_t per_block = int64_t{kThreads / lanes} * kGroupsAtOnce;
    return launch(quantize_short<lanes>, (job.n_all + per_block - 1) / per_block, kThreads, 0, stream, job);
}

}  // namespace
}  // namespace mpsearch::cuda

using namespace mpsearch::cuda;

int mpsearch_quantize(const mpsearch::QuantizeArguments* arguments, uintptr_t stream) {
    QuantizeJob job{*arguments, 0, 0, 0, 0};
    const int bits = job.bits;
    job.n_all = job.rows * job.n_groups;
    job.top = static_cast<float>((1 << bits) - 1);
    job.middle = bits == 1 ? 0.5f : static_cast<float>(1 << (bits - 1));
    job.steps = !job.symmetric ? job.top : bits == 1 ? 0.5f : job.middle - 1;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(job.weight) | 4 * reinterpret_cast<uintptr_t>(job.codes);
    if (!job.ratios && job.columns % job.group_size == 0 && addresses % 16 == 0) {
        if (job.group_size == 16) return launch_short<4>(job, stream);
        if (job.group_size == 32) return launch_short<8>(job, stream);
        if (job.group_size == 64) return launch_short<16>(job, stream);
        if (job.group_size == 128) return launch_short<32>(job, stream);
    }
    constexpr int64_t per_block = kThreads / kWarp;
    return launch(quantize_any, (job.n_all + per_block - 1) / per_block, kThreads, 0, stream, job);
}
