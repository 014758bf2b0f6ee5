// Staging: x in the order in which the products read it, as floats or quantized to int8.
//
//     int8   scale = max|x| / 127 or the given one    inverse = 1 / scale, or 0 where scale is below 2^-126
//            code = rint(x * inverse)
//
// for each token (a row of x), codes clamped to [-127, 127]; a token with a value that is not finite has the scale NaN,
// which makes its whole result NaN. Staged are, for each group, each block of tokens and each 4 columns, the 4 values of
// each token of the block. Columns between a group's end and its last whole block, and tokens between the last and its
// block's end, are 0.
//
// One thread handles a range of token blocks. Bytes moved per value: 8 (floats) or 9 (int8: it is read twice). Bound:
// memory or, for few tokens, the first cache.
#include "tile.h"

MPSEARCH_DECLARE_KERNELS(MPSEARCH_ISA)

namespace mpsearch::MPSEARCH_ISA {

int tokens_per_block(int64_t n_tokens) {
    if (n_tokens == 1) return 1;
    return kVectors == 1 && n_tokens > 4 ? 8 : 4;  // as many as there are registers for
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

// max|x| / 127, or NaN where a value is not finite.
static float scale_of(const float* x, int64_t n) {
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
    return largest(max(broadcast(0) - low, high)) / 127.0f + sum;
}

// Four codes, of 0 beyond the first n. 1.5 * 2^23 + x has no bits left for a fraction, and its low byte is the code.
MPSEARCH_INLINE void quantize_quad(const float* x, int64_t n, float inverse, int8_t* codes) {
    for (int64_t i = 0; i < 4; ++i) {
        const float at = i < n ? x[i] * inverse : 0.0f;
        const float clamped = at > -127.0f ? (at < 127.0f ? at : 127.0f) : -127.0f;
        codes[i] = static_cast<int8_t>(bits_of(clamped + 12582912.0f));
    }
}

void stage_int8(const LinearJob& job, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        for (int t = 0; t < job.tokens_per_block; ++t) {
            const int64_t token = block * job.tokens_per_block + t;
            const bool there = token < job.n_tokens;
            const float* row = job.x + token * job.columns;
            float scale = there ? scale_of(row, job.columns) : 0.0f;
            if (job.input_scale > 0) scale = job.input_scale + (scale - scale);  // NaN stays
            const float inverse = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
            job.token_scales[token] = scale;
            for (int64_t group = 0; group < job.n_groups; ++group) {
                int8_t* to = static_cast<int8_t*>(job.staged) + 4 * (staged_at(job, group, block) + t);
                int32_t sum = 0;
                for_each_quad(job, row, group, [&](int64_t quad, const float* x, int64_t n) {
                    int8_t codes[4];
                    if (there && n == 4)
                        quantize_quad(x, 4, inverse, codes);
                    else
                        quantize_quad(x, there ? n : 0, inverse, codes);
                    sum += codes[0] + codes[1] + codes[2] + codes[3];
                    memcpy(to + 4 * quad * job.tokens_per_block, codes, sizeof(codes));
                });
                job.token_sums[(group * job.n_token_blocks + block) * job.tokens_per_block + t] = sum;
            }
        }
    }
}

}  // namespace mpsearch::MPSEARCH_ISA
