// Rounding rows jointly: coordinate descent on tr(G E H E^T); reference_joint.py has every rounding.
//
// A thread of the shell walks tiles of 32 rows, transposed, so that a column of a tile is a few vectors whose lanes are rows. With
// the sums S = E F^T of all rows, F being the column feedback, a tile's step is
//
//     targets[j] = sum over rows s of row_feedback[tile, s] * S[s, j]     (the shell shares columns j among threads)
//     each column in turn: the lanes, one after the other, move to their best code; q = row_feedback[tile, tile] * change
//     targets[l] += q[j] * F[l, j]     for later columns l
//     S[tile, j] += change[i] * F[j, i]     for the columns i that changed, once a block has need of it
//
// `joint_add` is the only product: 32 lanes by as many output columns as there are registers for, 128 terms at a time, whose
// vectors stay in the first cache. Bound: arithmetic, a multiplication and an addition for each (row, row, column) and each
// (row, column, changed column). Rounding is bound by the latency of a dependent chain of about 60 cycles for each changed code.
#include "half.h"
#include "kernels.h"
#include "simd.h"

namespace mpsearch::MPSEARCH_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kOutputs = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kOutputs = 2;
#elif defined(__aarch64__)
constexpr int kWidth = 4, kOutputs = 2;
#else
constexpr int kWidth = 4, kOutputs = 1;
#endif
constexpr int64_t kRows = kJointRows, kBlock = kJointColumns, kTerms = 128;
constexpr int kVectors = kRows / kWidth;
constexpr float kSmallestNormal = 0x1p-126f, kLargest = 0x1.fffffep127f, kLargestHalf = 65504;

typedef float Vector __attribute__((vector_size(4 * kWidth)));

// A column of a tile.
struct Lanes {
    Vector part[kVectors];
};

template <class Operation>
MPSEARCH_INLINE Lanes each(const Lanes& a, const Lanes& b, Operation operation) {
    Lanes result;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) result.part[i] = operation(a.part[i], b.part[i]);
    return result;
}
MPSEARCH_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
    return each(a, b, [](Vector x, Vector y) { return x + y; });
}
MPSEARCH_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
    return each(a, b, [](Vector x, Vector y) { return x - y; });
}
MPSEARCH_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
    return each(a, b, [](Vector x, Vector y) { return x * y; });
}
MPSEARCH_INLINE Lanes all(float value) {
    Lanes result;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) result.part[i] = value - Vector{};
    return result;
}
MPSEARCH_INLINE Vector load_vector(const float* from) {
    Vector result;
    memcpy(&result, from, sizeof(result));
    return result;
}
MPSEARCH_INLINE void store_vector(Vector value, float* to) {
    memcpy(to, &value, sizeof(value));
}
// Vector by vector: the address of all of them would keep them in memory.
MPSEARCH_INLINE Lanes load_lanes(const float* from) {
    Lanes result;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) result.part[i] = load_vector(from + i * kWidth);
    return result;
}
MPSEARCH_INLINE void store_lanes(const Lanes& value, float* to) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) store_vector(value.part[i], to + i * kWidth);
}

// rint(clamp(value, 0, top)): 2^23 + x has no bits left for a fraction.
MPSEARCH_INLINE Lanes nearest(const Lanes& value, float top) {
    return each(value, all(top), [](Vector x, Vector most) {
        const Vector none = {}, shift = 8388608.0f - Vector{};
        x = x > none ? x : none;
        x = x < most ? x : most;
        return (x + shift) - shift;
    });
}

// Bit r: whether lane r differs.
MPSEARCH_INLINE uint32_t differing(const Lanes& a, const Lanes& b) {
    uint32_t mask = 0;
    for (int i = 0; i < kVectors; ++i) {
#if defined(__AVX512F__)
        const uint32_t part =
            _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a.part[i]), reinterpret_cast<__m512>(b.part[i]), _CMP_NEQ_UQ);
#elif defined(__AVX2__)
        const auto part = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.part[i], b.part[i], _CMP_NEQ_UQ)));
#else
        uint32_t part = 0;
        for (int k = 0; k < kWidth; ++k) part |= static_cast<uint32_t>(a.part[i][k] != b.part[i][k]) << k;
#endif
        mask |= part << (i * kWidth);
    }
    return mask;
}

template <int n>
MPSEARCH_INLINE void add_terms(
    const JointProduct& p, int64_t j, const float* from, int64_t stride, int64_t begin, int64_t end) {
    Vector sum[n][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < n; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            sum[m][v] = from ? load_vector(from + (j + m) * stride + v * kWidth) : Vector{};
    const float* factors = p.factors + j * p.factors_stride;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t k = p.terms[i];
        Vector lanes[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) lanes[v] = load_vector(p.lanes + k * kRows + v * kWidth);
#pragma GCC unroll 8
        for (int m = 0; m < n; ++m) {
            const Vector factor = factors[m * p.factors_stride + k] - Vector{};
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[m][v] = sum[m][v] + lanes[v] * factor;
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < n; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store_vector(sum[m][v], p.out + (j + m) * p.out_stride + v * kWidth);
}

void joint_add(const JointProduct& p, int64_t begin, int64_t end) {
    int64_t term = 0;
    do {  // at least once: there may be no term
        const int64_t last = term + kTerms < p.n_terms ? term + kTerms : p.n_terms;
        const float* from = term ? p.out : p.from;
        const int64_t stride = term ? p.out_stride : p.from_stride;
        int64_t j = begin;
        for (; j + kOutputs <= end; j += kOutputs) add_terms<kOutputs>(p, j, from, stride, term, last);
        for (; j < end; ++j) add_terms<1>(p, j, from, stride, term, last);
        term = last;
    } while (term < p.n_terms);
}

static float inverse_of(float scale) {
    return (scale < 0 ? -scale : scale) < kSmallestNormal ? 0 : 1.0f / scale;
}

void joint_load(JointTile& tile) {
    const JointArguments& job = *tile.job;
    memset(tile.row_feedback, 0, sizeof(float) * job.rows * kRows);
    for (int64_t r = 0; r < tile.n_rows; ++r)
        for (int64_t s = 0; s < job.rows; ++s)
            tile.row_feedback[s * kRows + r] = job.row_feedback[(tile.row + r) * job.rows + s];
    for (int64_t g = 0; g < job.n_groups; ++g)
        for (int64_t r = 0; r < kRows; ++r) {
            const bool there = r < tile.n_rows;
            const int64_t at = (tile.row + r) * job.n_groups + g;
            tile.scales[g * kRows + r] = there ? job.scales[at] : 0;
            tile.inverses[g * kRows + r] = there ? inverse_of(job.scales[at]) : 0;
            tile.zeros[g * kRows + r] = there ? job.zero_points[at] : 0;
        }
}

void joint_load_columns(const JointTile& tile, int64_t begin, int64_t end) {
    const JointArguments& job = *tile.job;
    constexpr int64_t kStep = 16;  // columns whose lanes stay in the first cache
    for (int64_t from = begin; from < end; from += kStep) {
        const int64_t to = from + kStep < end ? from + kStep : end;
        memset(tile.weight + from * kRows, 0, sizeof(float) * (to - from) * kRows);
        memset(tile.codes + from * kRows, 0, sizeof(float) * (to - from) * kRows);
        memset(tile.fixed + from, 0, sizeof(uint32_t) * (to - from));
        for (int64_t r = 0; r < tile.n_rows; ++r) {
            const int64_t at = (tile.row + r) * job.columns;
            for (int64_t j = from; j < to; ++j) {
                tile.weight[j * kRows + r] = job.weight[at + j];
                tile.codes[j * kRows + r] = job.begin ? -1.0f : static_cast<float>(job.codes[at + j]);
                if (job.fixed && job.fixed[at + j]) tile.fixed[j] |= uint32_t{1} << r;
            }
        }
        for (int64_t j = from; j < to; ++j) {
            const int64_t group = job.column_groups[j];
            Lanes value = load_lanes(tile.codes + j * kRows) - load_lanes(tile.zeros + group * kRows);
            store_lanes(value, tile.values + j * kRows);
            for (uint32_t left = tile.fixed[j]; left; left &= left - 1)
                tile.values[j * kRows + __builtin_ctz(left)] = 0;
            value = load_lanes(tile.values + j * kRows);
            const Lanes error = value * load_lanes(tile.scales + group * kRows) - load_lanes(tile.weight + j * kRows);
            store_lanes(job.begin ? all(0) : error, tile.errors + j * kRows);
        }
    }
}

void joint_store(const JointTile& tile) {
    const JointArguments& job = *tile.job;
    for (int64_t r = 0; r < tile.n_rows; ++r) {
        for (int64_t g = 0; g < job.n_groups; ++g)
            job.scales[(tile.row + r) * job.n_groups + g] = tile.scales[g * kRows + r];
        for (int64_t j = 0; j < job.columns; ++j) {
            const float code = tile.codes[j * kRows + r];
            job.codes[(tile.row + r) * job.columns + j] = static_cast<uint8_t>(code < 0 ? 0 : code);  // a fixed one
        }
    }
}

bool joint_fit(JointTile& tile, int64_t group, int64_t begin, int64_t end) {
    const JointArguments& job = *tile.job;
    const float* own = tile.row_feedback + tile.row * kRows;
    float norms[kRows * kRows] = {}, slope[kRows], steps[kRows] = {};
    Lanes sum = all(0);
    for (int64_t j = begin; j < end; ++j) {
        const Lanes value = load_lanes(tile.values + j * kRows), weight = all(job.column_weights[j]);
        sum = sum + (value * load_lanes(tile.targets + j * kRows)) * weight;
        for (int64_t r = 0; r < kRows; ++r)
            store_lanes(load_lanes(norms + r * kRows) + (value * weight) * all(tile.products[j * kRows + r]),
                        norms + r * kRows);
    }
    bool any = false;
    float* scales = tile.scales + group * kRows;
    const float most = job.half_scales ? kLargestHalf : kLargest;
    for (int64_t r = 0; r < tile.n_rows; ++r) {
        store_lanes(sum, slope);
        const float norm = norms[r * kRows + r];
        if (scales[r] == 0 || !(norm > 0)) continue;
        float moved = scales[r] - slope[r] / norm;
        moved = moved < most ? (moved > -most ? moved : -most) : most;
        if (job.half_scales) moved = float_from_half(half_from_float(moved));
        steps[r] = moved - scales[r];
        if (steps[r] == 0) continue;
        any = true;
        scales[r] = moved;
        tile.inverses[group * kRows + r] = inverse_of(moved);
        sum = sum + (load_lanes(own + r * kRows) * all(steps[r])) * load_lanes(norms + r * kRows);
    }
    if (!any) return false;
    for (int64_t j = begin; j < end; ++j) {
        const Lanes before = load_lanes(tile.errors + j * kRows);
        const Lanes error =
            load_lanes(tile.values + j * kRows) * load_lanes(scales) - load_lanes(tile.weight + j * kRows);
        store_lanes(error, tile.errors + j * kRows);
        store_lanes(error - before, tile.changes + j * kRows);
        float* sums = tile.sums + j * tile.padded_rows + tile.row;
        store_lanes(load_lanes(sums) + load_lanes(tile.products + j * kRows) * load_lanes(steps), sums);
    }
    return true;
}

int64_t joint_round(JointTile& tile, int64_t begin, int64_t end) {
    const JointArguments& job = *tile.job;
    const float* own = tile.row_feedback + tile.row * kRows;
    const float top = static_cast<float>((1 << job.bits) - 1);
    const int64_t first = tile.n_moved;
    float steps[kBlock * kRows];  // q of the columns that moved
    int64_t n_changed = 0;
    for (int64_t j = begin; j < end; ++j) {
        const float* factors = job.column_feedback + j * job.columns;
        Lanes target = load_lanes(tile.targets + j * kRows);
        for (int64_t i = first; i < tile.n_moved; ++i)
            target = target + load_lanes(steps + (i - first) * kRows) * all(factors[tile.moved[i]]);
        const int64_t at = job.column_groups[j] * kRows;
        const float *weight = tile.weight + j * kRows, *scale = tile.scales + at, *zero = tile.zeros + at;
        float *errors = tile.errors + j * kRows, *codes = tile.codes + j * kRows, *changes = tile.changes + j * kRows;
        const Lanes now = load_lanes(weight) + load_lanes(errors), inverse = load_lanes(tile.inverses + at);
        const Lanes zeros = load_lanes(zero), before = load_lanes(codes);
        Lanes q = all(0);
        bool any = false;
        uint32_t open = ~tile.fixed[j] & (~uint32_t{0} >> (kRows - tile.n_rows));  // lanes that have not had their turn
        while (open) {
            const Lanes best = nearest((now - (target + q)) * inverse + zeros, top);
            const uint32_t differ = differing(best, before) & open;
            if (!differ) break;
            const int r = __builtin_ctz(differ);
            float lanes[kRows];
            store_lanes(best, lanes);
            if (!any) store_lanes(all(0), changes);
            any = true;
            const float error = (lanes[r] - zero[r]) * scale[r] - weight[r], change = error - errors[r];
            codes[r] = lanes[r];
            errors[r] = error;
            changes[r] = change;
            q = q + load_lanes(own + r * kRows) * all(change);
            open &= r == 31 ? 0 : ~uint32_t{0} << (r + 1);
            ++n_changed;
        }
        if (!any) continue;
        store_lanes(q, steps + (tile.n_moved - first) * kRows);
        tile.moved[tile.n_moved++] = static_cast<int32_t>(j);
    }
    return n_changed;
}

}  // namespace mpsearch::MPSEARCH_ISA
