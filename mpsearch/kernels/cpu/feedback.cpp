// Rounding with feedback: the inner loop of GPTQ and of coordinate descent; reference_feedback.py has every rounding.
//
//     target[j] = weight[j] - sum over i of e[i] * feedback[j, i]      code = rint(clamp(target / scale + zero))
//     e[j]      = (code - zero) * scale - weight[j], but unchanged where fixed     columns in ascending order, in blocks of 128
//
// Rows do not depend on one another: a thread handles tiles of 32 rows, transposed, so that a column of a tile is four
// vectors. A block's targets first take the errors of all other blocks (a product of [128, columns] and [columns, 32],
// two columns by 32 rows in registers, errors of 128 columns at a time in the first cache), then follow one by one within
// the block. Every sum has the order of the specification, whatever the blocking.
// Bytes moved: the feedback, 4 * columns^2 (half of it without errors), once a tile; weights and codes once.
// Bound: arithmetic, a multiplication and a subtraction for each (row, column, column).
#include "codes.h"
#include "kernels.h"

namespace mpsearch::MPSEARCH_ISA {

constexpr int64_t kRows = kFeedbackRows, kBlock = 128;
constexpr int kVectors = kRows / 8;
constexpr float kSmallestNormal = 0x1p-126f;

// target[j] and target[j + 1] -= the errors of columns [begin, end).
template <int n>
MPSEARCH_INLINE void subtract(const float* errors,    // [columns, 32]
                              const float* feedback,  // [n, columns], rows `columns` apart
                              int64_t columns,
                              int64_t begin,
                              int64_t end,
                              float* target) {  // [n, 32]
    F8 sum[n][kVectors];
    for (int j = 0; j < n; ++j)
        for (int v = 0; v < kVectors; ++v) sum[j][v] = load(target + j * kRows + 8 * v);
    for (int64_t i = begin; i < end; ++i) {
        F8 factor[n];
        for (int j = 0; j < n; ++j) factor[j] = broadcast(feedback[j * columns + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const F8 error = load(errors + i * kRows + 8 * v);
#pragma GCC unroll 2
            for (int j = 0; j < n; ++j) sum[j][v] = sum[j][v] - error * factor[j];
        }
    }
    for (int j = 0; j < n; ++j)
        for (int v = 0; v < kVectors; ++v) store(sum[j][v], target + j * kRows + 8 * v);
}

// What a group's columns share, of 32 rows.
struct Grid {
    float scale[kRows], inverse[kRows], zero[kRows];
};

static void load_grid(const FeedbackArguments& job, int64_t row, int64_t n_rows, int64_t group, Grid& grid) {
    for (int64_t r = 0; r < kRows; ++r) {
        const bool there = r < n_rows;
        const float scale = there ? job.scales[(row + r) * job.n_groups + group] : 0;
        const bool vanishes = (scale < 0 ? -scale : scale) < kSmallestNormal;
        grid.scale[r] = scale;
        grid.inverse[r] = vanishes ? 0 : 1.0f / scale;
        grid.zero[r] = there ? job.zero_points[(row + r) * job.n_groups + group] : 0;
    }
}

// Columns [begin, end) of a tile whose targets have the errors of all columns before the block in them.
static void round_block(const FeedbackArguments& job,
                        const float* feedback,
                        int64_t row,
                        int64_t n_rows,
                        int64_t begin,
                        int64_t end,
                        float* target,    // [end - begin, 32]
                        float* errors,    // [columns, 32]
                        float* within) {  // [128, 128], scratch
    const int64_t size = end - begin;
    for (int64_t l = 0; l < size; ++l)  // turned round, so that what follows reads it in order
        for (int64_t j = 0; j < l; ++j) within[j * kBlock + l] = feedback[(begin + l) * job.columns + begin + j];
    const F8 top = broadcast(static_cast<float>((1 << job.bits) - 1)), none = broadcast(0);
    Grid grid;
    int64_t group = -1;
    for (int64_t j = 0; j < size; ++j) {
        const int64_t column = begin + j;
        if (job.column_groups[column] != group) load_grid(job, row, n_rows, group = job.column_groups[column], grid);
        float weight[kRows] = {}, fixed[kRows] = {};
        for (int64_t r = 0; r < n_rows; ++r) weight[r] = job.weight[(row + r) * job.columns + column];
        if (job.fixed)
            for (int64_t r = 0; r < n_rows; ++r) fixed[r] = job.fixed[(row + r) * job.columns + column];
        F8 change[kVectors];
        uint8_t codes[kRows];
        for (int v = 0; v < kVectors; ++v) {
            const F8 zero = load(grid.zero + 8 * v);
            const F8 position = load(target + j * kRows + 8 * v) * load(grid.inverse + 8 * v) + zero;
            const F8 code = round_nonnegative(min(max(position, none), top));
            const F8 before = load(errors + column * kRows + 8 * v);
            const F8 after = (code - zero) * load(grid.scale + 8 * v) - load(weight + 8 * v);
            const F8 error = where_less(none, load(fixed + 8 * v), before, after);
            change[v] = error - before;
            store(error, errors + column * kRows + 8 * v);
            store_codes(code, codes + 8 * v, 8);
        }
        for (int64_t r = 0; r < n_rows; ++r) job.codes[(row + r) * job.columns + column] = codes[r];
        for (int64_t l = j + 1; l < size; ++l) {
            const F8 factor = broadcast(within[j * kBlock + l]);
            for (int v = 0; v < kVectors; ++v)
                store(load(target + l * kRows + 8 * v) - change[v] * factor, target + l * kRows + 8 * v);
        }
    }
}

void round_with_feedback(const FeedbackArguments& job, int64_t begin, int64_t end, float* scratch) {
    const int64_t columns = job.columns, tiles_per_matrix = (job.rows_per_matrix + kRows - 1) / kRows;
    float* errors = scratch;
    float* target = errors + columns * kRows;
    float* within = target + kBlock * kRows;
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t matrix = tile / tiles_per_matrix, first = tile % tiles_per_matrix * kRows;
        const int64_t row = matrix * job.rows_per_matrix + first;
        const int64_t n_rows = job.rows_per_matrix - first < kRows ? job.rows_per_matrix - first : kRows;
        const float* feedback = job.feedback + matrix * columns * columns;
        memset(errors, 0, sizeof(float) * columns * kRows);
        if (job.errors)
            for (int64_t r = 0; r < n_rows; ++r)
                for (int64_t i = 0; i < columns; ++i) errors[i * kRows + r] = job.errors[(row + r) * columns + i];
        for (int64_t from = 0; from < columns; from += kBlock) {
            const int64_t to = from + kBlock < columns ? from + kBlock : columns;
            memset(target, 0, sizeof(float) * kBlock * kRows);
            for (int64_t r = 0; r < n_rows; ++r)
                for (int64_t j = from; j < to; ++j)
                    target[(j - from) * kRows + r] = job.weight[(row + r) * columns + j];
            const int64_t last = job.errors ? columns : from;  // later columns have no errors yet
            for (int64_t i = 0; i < last; i += kBlock) {
                const int64_t i_end = i + kBlock < last ? i + kBlock : last;
                for (int64_t j = from; j < to;) {
                    const float* rows = feedback + j * columns;
                    float* of = target + (j - from) * kRows;
                    if (i == from) {  // the diagonal does not count
                        subtract<1>(errors, rows, columns, i, j, of);
                        subtract<1>(errors, rows, columns, j + 1, i_end, of);
                        j += 1;
                    } else if (j + 1 < to) {
                        subtract<2>(errors, rows, columns, i, i_end, of);
                        j += 2;
                    } else {
                        subtract<1>(errors, rows, columns, i, i_end, of);
                        j += 1;
                    }
                }
            }
            round_block(job, feedback, row, n_rows, from, to, target, errors, within);
        }
    }
}

}  // namespace mpsearch::MPSEARCH_ISA
