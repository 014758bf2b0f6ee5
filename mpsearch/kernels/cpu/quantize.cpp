// Group-wise quantization, with an optional search over clip ratios.
//
//     symmetric    step = max|x| / max(2^(bits-1) - 1, 0.5)    zero = 2^(bits-1), at 1 bit 0.5
//     asymmetric   step = (high - low) / (2^bits - 1)          zero = rint(clamp(-(ratio * low) / scale))
//     scale = round(ratio * step)    code = rint(clamp(x / scale + zero))
//
// where 1 / scale is rounded before it multiplies; reference.py has every rounding. The search takes the ratio with the
// least scale^2 * sum((code - (x / scale + zero))^2 * importance), the sum kept in eight lanes (column j in lane j % 8).
//
// One thread handles a range of groups, up to eight at a time: their scales are computed as the lanes of one vector. In
// the search those lanes are eight ratios of one group, and four of them share each load of the group's columns.
// Stopping where a ratio can no longer win was tried: what it saves at 80 ratios, mispredicted exits cost at 20.
// Bytes moved per weight: 4 read, 1 written. Bound: without a search memory, and a fresh output's
// page faults; with one arithmetic, 8 operations per column and ratio.
#include "codes.h"
#include "half.h"
#include "kernels.h"

namespace mpsearch::MPSEARCH_ISA {

constexpr float kSmallestNormal = 0x1p-126f;  // scales below it have no finite inverse: they count as 0
constexpr float kInfinity = __builtin_inff();
constexpr int64_t kRatioBlock = 32;     // clip ratios whose grids are laid out before their errors are measured
constexpr int64_t kBatchBytes = 16384;  // of weights kept in the first cache between the two passes over them

// What all groups of a job share.
struct Format {
    F8 top;    // largest code
    F8 steps;  // steps between 0 (symmetric) or the lowest value and the highest
    F8 zero;   // implied zero point, symmetric only
    bool symmetric;
    bool half_scales;
};

static Format format_of(const QuantizeArguments& job) {
    const float top = static_cast<float>((1 << job.bits) - 1), middle = static_cast<float>(1 << (job.bits - 1));
    const bool one_bit = job.bits == 1;
    const float symmetric_steps = one_bit ? 0.5f : middle - 1;
    return {broadcast(top), broadcast(job.symmetric ? symmetric_steps : top), broadcast(one_bit ? 0.5f : middle),
            job.symmetric, job.half_scales};
}

// Eight quantization grids: of eight groups, or of eight clip ratios of one group.
struct Grids {
    F8 scale, inverse, zero;
};

static inline F8 step_of(const Format& format, F8 low, F8 high) {
    const F8 none = broadcast(0);
    return (format.symmetric ? max(none - low, high) : high - low) / format.steps;
}

static inline Grids make_grids(const Format& format, F8 step, F8 low, F8 ratio) {
    const F8 none = broadcast(0);
    Grids grids;
    grids.scale = ratio * step;
    if (format.half_scales) grids.scale = round_to_half(grids.scale);
    const F8 size = max(grids.scale, none - grids.scale), smallest = broadcast(kSmallestNormal);
    grids.scale = where_less(size, smallest, none, grids.scale);
    grids.inverse = where_less(size, smallest, none, broadcast(1) / grids.scale);
    grids.zero = format.symmetric ? format.zero
                                  : round_nonnegative(min(max((none - ratio * low) * grids.inverse, none), format.top));
    return grids;
}

// x / scale + zero, and the code nearest to it, as a float.
MPSEARCH_INLINE F8 position(F8 x, F8 inverse, F8 zero) {
    return x * inverse + zero;
}
MPSEARCH_INLINE F8 nearest_code(F8 position, F8 top) {
    return round_nonnegative(min(max(position, broadcast(0)), top));
}

// Lowest and highest of n weights and 0; `poison` becomes NaN where a weight is not finite.
static inline void find_range(const float* x, int64_t n, float& low, float& high, F8& poison) {
    F8 lowest = broadcast(0), highest = broadcast(0);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const F8 value = load(x + i);
        lowest = min(value, lowest);
        highest = max(value, highest);
        poison = poison + (value - value);
    }
    if (i < n) {
        const F8 value = load_first(x + i, n - i);
        lowest = min(value, lowest);
        highest = max(value, highest);
        poison = poison + (value - value);
    }
    low = smallest(lowest);
    high = largest(highest);
}

// Adds the squared errors, in units of scale^2, of eight columns on four grids.
template <bool weighted>
MPSEARCH_INLINE void add_squares(F8 x, F8 counts, F8 top, const F8 (&inverse)[4], const F8 (&zero)[4], F8 (&sum)[4]) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const F8 at = position(x, inverse[c], zero[c]);
        const F8 off = nearest_code(at, top) - at;
        sum[c] = sum[c] + (weighted ? off * off * counts : off * off);
    }
}

// The errors of one group on four grids, in one pass over the columns, which all four share.
template <bool weighted>
static inline void measure_errors(const float* x,           // [n]
                                  const float* importance,  // [n], weighted only
                                  int64_t n,
                                  F8 top,
                                  const float* inverses,  // [4]
                                  const float* zeros,     // [4]
                                  float* errors) {        // [4]
    F8 inverse[4], zero[4], sum[4];
    for (int c = 0; c < 4; ++c) {
        inverse[c] = broadcast(inverses[c]);
        zero[c] = broadcast(zeros[c]);
        sum[c] = broadcast(0);
    }
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        add_squares<weighted>(load(x + i), weighted ? load(importance + i) : broadcast(1), top, inverse, zero, sum);
    if (i < n) {  // columns that are not there count 0
        const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
        const F8 counts = load_first(weighted ? importance + i : ones, n - i);
        add_squares<true>(load_first(x + i, n - i), counts, top, inverse, zero, sum);
    }
    store_sums(sum, errors);
}

// The ratio with the least error; of equals the first.
template <bool weighted>
static float best_ratio(const QuantizeArguments& job,
                        const Format& format,
                        const float* x,
                        const float* importance,
                        int64_t n,
                        float low,
                        float high) {
    const F8 step = step_of(format, broadcast(low), broadcast(high));
    F8 least = broadcast(kInfinity), chosen = broadcast(0);
    const float first_lanes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    F8 index = load(first_lanes);
    for (int64_t begin = 0; begin < job.n_ratios; begin += kRatioBlock) {
        const int64_t count = job.n_ratios - begin < kRatioBlock ? job.n_ratios - begin : kRatioBlock;
        float factors[kRatioBlock], inverses[kRatioBlock], zeros[kRatioBlock], errors[kRatioBlock] = {};
        for (int64_t i = 0; i < count; i += 8) {
            const F8 ratio = load_first(job.ratios + begin + i, count - i < 8 ? count - i : 8);
            const Grids grids = make_grids(format, step, broadcast(low), ratio);
            const F8 squared = grids.scale * grids.scale, size = max(grids.scale, broadcast(0) - grids.scale);
            // A scale of 0 loses the whole group but shows no error; lanes without a ratio have it too.
            store(where_less(broadcast(0), size, squared, broadcast(kInfinity)), factors + i);
            store(grids.inverse, inverses + i);
            store(grids.zero, zeros + i);
        }
        for (int64_t i = 0; i < count; i += 4)
            measure_errors<weighted>(x, importance, n, format.top, inverses + i, zeros + i, errors + i);
        for (int64_t i = 0; i < count; i += 8, index = index + broadcast(8)) {
            const F8 error = load(factors + i) * load(errors + i);
            chosen = where_less(error, least, index, chosen);
            least = where_less(error, least, error, least);
        }
    }
    // Each lane has the first of its own; of the lanes with the least error the lowest index is the first of all.
    const F8 candidates = where_less(broadcast(smallest(least)), least, broadcast(kInfinity), chosen);
    return job.ratios[static_cast<int64_t>(smallest(candidates))];
}

static inline void write_codes(const float* x, int64_t n, F8 top, F8 inverse, F8 zero, uint8_t* codes) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        F8 code[4];
        for (int k = 0; k < 4; ++k) code[k] = nearest_code(position(load(x + i + 8 * k), inverse, zero), top);
        store_codes(code, codes + i);
    }
    for (; i < n; i += 8) {
        const int64_t here = n - i < 8 ? n - i : 8;
        store_codes(nearest_code(position(load_first(x + i, here), inverse, zero), top), codes + i, here);
    }
}

static void store_scales(const QuantizeArguments& job, const float* scale, int64_t group, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (job.half_scales)
            static_cast<uint16_t*>(job.scales)[group + i] = half_from_float(scale[i]);
        else
            static_cast<float*>(job.scales)[group + i] = scale[i];
    }
}

bool quantize(const QuantizeArguments& job, int64_t begin, int64_t end) {
    const Format format = format_of(job);
    const int64_t fitting = kBatchBytes / (static_cast<int64_t>(sizeof(float)) * job.group_size);
    const int64_t batch = fitting < 1 ? 1 : fitting < 8 ? fitting : 8;
    F8 poison = broadcast(0);
    for (int64_t group = begin; group < end; group += batch) {
        const int64_t count = end - group < batch ? end - group : batch;
        float low[8] = {}, high[8] = {}, ratio[8] = {1, 1, 1, 1, 1, 1, 1, 1};
        int64_t at[8], size[8];
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = (group + i) / job.n_groups, column = (group + i) % job.n_groups * job.group_size;
            at[i] = row * job.columns + column;
            size[i] = job.columns - column < job.group_size ? job.columns - column : job.group_size;
            const float* x = job.weight + at[i];
            find_range(x, size[i], low[i], high[i], poison);
            if (job.importance)
                ratio[i] = best_ratio<true>(job, format, x,
                                            job.importance + row / job.rows_per_importance * job.columns + column,
                                            size[i], low[i], high[i]);
            else if (job.ratios)
                ratio[i] = best_ratio<false>(job, format, x, nullptr, size[i], low[i], high[i]);
        }
        const F8 lows = load(low);
        const Grids grids = make_grids(format, step_of(format, lows, load(high)), lows, load(ratio));
        poison = poison + (grids.scale - grids.scale);
        float scale[8], inverse[8], zero[8];
        store(grids.scale, scale);
        store(grids.inverse, inverse);
        store(grids.zero, zero);
        store_scales(job, scale, group, count);
        if (job.zero_points) store_codes(grids.zero, job.zero_points + group, count);
        for (int64_t i = 0; i < count; ++i) {
            const F8 inverse_of = broadcast(inverse[i]), zero_of = broadcast(zero[i]);
            write_codes(job.weight + at[i], size[i], format.top, inverse_of, zero_of, job.codes + at[i]);
        }
    }
    float lanes[8], total = 0;
    store(poison, lanes);
    for (const float lane : lanes) total += lane;
    return total == 0;
}

}  // namespace mpsearch::MPSEARCH_ISA
