// Half-quadratic fitting of a group's grid, the inner loop of HQQ; reference_half_quadratic.py has every rounding.
//
//     r = x - (code - zero) * scale    a = |r| / unit    e = max(a - a^(-1/4) / beta, 0) * unit    y = x - e
//     zero += rint(mean(d - y / scale))    scale = sum((code - zero) y) / sum((code - zero)^2)
//
// One thread handles a range of groups, one group after the other: all steps run while it lies in the first cache, eight
// columns at a time. What a new zero point does to the two sums of the scale is worked out from four sums, so that a step is
// one pass. Bytes moved per weight: 4 read, 1 written. Bound: two roots and a division for each weight and step.
#include "codes.h"
#include "half.h"
#include "kernels.h"

namespace mpsearch::MPSEARCH_ISA {

constexpr float kSmallestNormal = 0x1p-126f;

static float size_of(float value) {
    return value < 0 ? -value : value;
}
static float inverse_of(float scale) {
    return size_of(scale) < kSmallestNormal ? 0 : 1.0f / scale;
}
static float nearest(float value, float top) {  // rint(clamp(value, 0, top)), with eight lanes' rounding
    float lanes[8];
    store(round_nonnegative(min(max(broadcast(value), broadcast(0)), broadcast(top))), lanes);
    return lanes[0];
}

struct Sums {
    F8 cost, d, y, dd, dy;
};

struct Step {
    F8 top, scale, inverse, zero, unit, per_unit, per_beta;
};

// Adds eight columns; `there` is 1, and 0 for those beyond the group's end, whose x is 0.
template <bool whole>
MPSEARCH_INLINE void add_columns(F8 x, F8 there, const Step& step, Sums& sums) {
    const F8 none = broadcast(0);
    const F8 code = round_nonnegative(min(max(x * step.inverse + step.zero, none), step.top));
    const F8 d = whole ? code - step.zero : (code - step.zero) * there;
    const F8 r = x - d * step.scale;
    const F8 a = max(max(r, none - r) * step.per_unit, broadcast(kSmallestNormal));
    const F8 root = broadcast(1) / square_root(square_root(a));
    const F8 cost = whole ? a * root : a * root * there;
    const F8 e = max(a - root * step.per_beta, none) * step.unit;
    const F8 y = x - where_less(r, none, none - e, e);
    sums.cost = sums.cost + cost;
    sums.d = sums.d + d;
    sums.y = sums.y + y;
    sums.dd = sums.dd + d * d;
    sums.dy = sums.dy + d * y;
}

static void fit_group(
    const HalfQuadraticArguments& job, const float* x, int64_t n, float& best_scale, float& best_zero) {
    const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const float top = static_cast<float>((1 << job.bits) - 1), count = static_cast<float>(n);
    float scale = best_scale, zero = best_zero, best = __builtin_inff();
    const float unit = size_of(scale), per_unit = inverse_of(unit);
    for (int64_t t = 0; t < job.n_betas; ++t) {
        const float inverse = inverse_of(scale);
        const Step step{broadcast(top),
                        broadcast(scale),
                        broadcast(inverse),
                        broadcast(zero),
                        broadcast(unit),
                        broadcast(per_unit),
                        broadcast(1.0f / job.betas[t])};
        const F8 none = broadcast(0);
        Sums sums{none, none, none, none, none};
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) add_columns<true>(load(x + i), none, step, sums);
        if (i < n) add_columns<false>(load_first(x + i, n - i), load_first(ones, n - i), step, sums);
        float cost[4], of[4];
        store_sums({sums.cost, none, none, none}, cost);
        store_sums({sums.d, sums.y, sums.dd, sums.dy}, of);
        if (cost[0] < best) {
            best = cost[0];
            best_scale = scale;
            best_zero = zero;
        }
        const float shift = job.fit_zeros ? nearest((of[0] - inverse * of[1]) / count + zero, top) - zero : 0.0f;
        const float divisor = (of[2] - (shift + shift) * of[0]) + count * shift * shift;
        float moved = (of[3] - shift * of[1]) / divisor;
        if (job.half_scales) moved = float_from_half(half_from_float(moved));
        const float size = size_of(moved);
        if (divisor > 0 && size >= kSmallestNormal && size < __builtin_inff()) scale = moved;
        zero += shift;
    }
}

void half_quadratic(const HalfQuadraticArguments& job, int64_t begin, int64_t end) {
    const F8 none = broadcast(0), top = broadcast(static_cast<float>((1 << job.bits) - 1));
    for (int64_t group = begin; group < end; ++group) {
        const int64_t column = group % job.n_groups * job.group_size, left = job.columns - column;
        const int64_t at = group / job.n_groups * job.columns + column;
        const int64_t n = left < job.group_size ? left : job.group_size;
        fit_group(job, job.weight + at, n, job.scales[group], job.zero_points[group]);
        const F8 inverse = broadcast(inverse_of(job.scales[group])), zero = broadcast(job.zero_points[group]);
        for (int64_t i = 0; i < n; i += 8) {
            const int64_t here = n - i < 8 ? n - i : 8;
            const F8 x = here == 8 ? load(job.weight + at + i) : load_first(job.weight + at + i, here);
            store_codes(round_nonnegative(min(max(x * inverse + zero, none), top)), job.codes + at + i, here);
        }
    }
}

}  // namespace mpsearch::MPSEARCH_ISA
