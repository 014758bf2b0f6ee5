// Staging: x in the order in which the products read it, as floats or quantized to int8.
//
// input.h says how. Staged are, for each group, each block of tokens and each 4 columns, the 4 values of each token (a row of
// x) of the block. Columns between a group's end and its last whole block, and tokens between the last and its block's end,
// are what 0 becomes; they are in no token's sum.
//
// One thread handles a range of token blocks. Bytes moved per value: 8 (floats) or 9 (int8: it is read twice). Bound:
// memory or, for few tokens, the first cache.
#include "tile.h"

namespace mpsearch::MPSEARCH_ISA {

int tokens_per_block(int64_t n_tokens, bool int8_input) {
    if (n_tokens == 1) return 1;
    if (int8_input && n_tokens <= kFewTokens) return static_cast<int>((n_tokens + 3) / 4 * 4);
    return n_tokens <= 4 ? 4 : kBlockTokens;
}

// Calls write(quad, columns, n) for each 4 columns of a group, `columns` pointing to n values that x has there.
template <class Write>
MPSEARCH_INLINE void for_each_quad(const LinearJob& job, const float* x, int64_t group, Write write) {
    const int64_t begin = group * job.group_size, left = job.columns - begin;
    const int64_t n = left < job.group_size ? left : job.group_size;
    for (int64_t quad = 0; quad < job.group_blocks * kQuads; ++quad) {
        const int64_t here = n - 4 * quad;
        write(quad, x + begin + 4 * quad, here < 0 ? 0 : here > 4 ? 4 : here);
    }
}

// Where the staged values of a group and token block begin, in quads; then quad q of token t is at q * tokens_per_block + t.
MPSEARCH_INLINE int64_t staged_at(const LinearJob& job, int64_t group, int64_t token_block) {
    return (group * job.n_token_blocks + token_block) * job.group_blocks * kQuads * job.tokens_per_block;
}

void stage(const LinearJob& job, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        for (int t = 0; t < job.tokens_per_block; ++t) {
            const int64_t token = block * job.tokens_per_block + t;
            for (int64_t group = 0; group < job.n_groups; ++group) {
                float* to = static_cast<float*>(job.staged) + 4 * (staged_at(job, group, block) + t);
                for_each_quad(job, job.x + token * job.columns, group, [&](int64_t quad, const float* x, int64_t n) {
                    float values[4] = {};
                    if (token < job.n_tokens) memcpy(values, x, n * sizeof(float));
                    memcpy(to + 4 * quad * job.tokens_per_block, values, sizeof(values));
                });
            }
        }
    }
}

static InputGrid grid_of(const InputFormat& format, const float* x, int64_t n) {
    F8 low = broadcast(0), high = broadcast(0), poison = broadcast(0);
    for (int64_t i = 0; i < n; i += 8) {
        const F8 value = i + 8 <= n ? load(x + i) : load_first(x + i, n - i);
        low = min(value, low);
        high = max(value, high);
        poison = poison + (value - value);
    }
    float lanes[8], sum = 0;
    store(poison, lanes);
    for (const float lane : lanes) sum += lane;
    return input_grid(format, sum - largest(broadcast(0) - low), largest(high));
}

// As many codes as `Lanes` has lanes, in the low bytes: 1.5 * 2^23 + x has no bits left for a fraction.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4b400000;

MPSEARCH_INLINE Ints quantize_lanes(Lanes x, const InputGrid& grid) {
    const Lanes most = grid.most - Lanes{}, least = grid.least - Lanes{};
    Lanes at = x * grid.inverse;
    at = at > least ? at : least;
    at = at < most ? at : most;
    return (Ints)(at + kRound) - (kRoundBits - grid.shift);
}

// Stages n values of a token in a group of `padded` columns, 4 of them together, `apart` bytes from one to the next four.
// Returns the sum of their codes.
static int32_t stage_group(
    const float* x, int64_t n, int64_t padded, const InputGrid& grid, int8_t* to, int64_t apart) {
    typedef int8_t Codes __attribute__((vector_size(kVectorRows)));
    Ints sums = {};
    for (int64_t i = 0; i < padded; i += kVectorRows) {
        Lanes values = {};
        if (i + kVectorRows <= n)
            values = load_vector<Lanes>(x + i);
        else if (i < n)
            memcpy(&values, x + i, (n - i) * sizeof(float));
        const Ints codes = quantize_lanes(values, grid);
        sums += codes;
        const Codes narrow = __builtin_convertvector(codes, Codes);
        for (int k = 0; k < kVectorRows; k += 4)
            memcpy(to + (i + k) / 4 * apart, reinterpret_cast<const int8_t*>(&narrow) + k, 4);
    }
    int32_t sum = static_cast<int32_t>(n - padded) * grid.shift;
    for (int k = 0; k < kVectorRows; ++k) sum += sums[k];
    return sum;
}

void stage_int8(const LinearJob& job, int64_t begin, int64_t end) {
    const int64_t padded = job.group_blocks * kBlockColumns;
    for (int64_t block = begin; block < end; ++block) {
        for (int t = 0; t < job.tokens_per_block; ++t) {
            const int64_t token = block * job.tokens_per_block + t;
            const bool there = token < job.n_tokens;
            const float* row = job.x + token * job.columns;
            const InputGrid grid = grid_of(job.input, row, there ? job.columns : 0);
            job.token_scales[token] = grid.scale;
            for (int64_t group = 0; group < job.n_groups; ++group) {
                const int64_t column = group * job.group_size, left = job.columns - column;
                const int64_t n = !there ? 0 : left < job.group_size ? left : job.group_size;
                int8_t* to = static_cast<int8_t*>(job.staged) + 4 * (staged_at(job, group, block) + t);
                job.token_sums[(group * job.n_token_blocks + block) * job.tokens_per_block + t] =
                    stage_group(row + column, n, padded, grid, to, 4 * job.tokens_per_block);
            }
        }
    }
}

}  // namespace mpsearch::MPSEARCH_ISA
