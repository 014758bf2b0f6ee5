// y = x W^T + bias with packed weights and x in float32.
//
//     y[m, r] = (sum over the columns c of (code[r, c] - zero[r, g]) * scale[r, g] * x[m, c]) + bias[r]
//
// code - zero is exact. One token: the products of a group are summed, then scaled. More tokens: (code - zero) * scale is
// rounded as `dequantize` has it. Sums are kept in float32 in an order that depends on the instruction set and on whether there
// is one token, fused where that can be, and the bias is added last; every way is within
// (columns + 8) * 2^-24 * (|bias| + sum |weight * x|) of the exact result.
//
// One thread handles a range of tiles (16 rows) for all tokens. One token: four tiles are read in lock-step, because a
// core draws more from memory in four streams than in one, and each sum is kept in four parts, because additions wait for
// one another. More tokens: a strip of the tile becomes floats in the first cache and is multiplied by every block of
// tokens. Bytes moved per weight: bits / 8, and for each 16 groups a header of 64 or 128. Bound: arithmetic, 4 operations on
// a vector of weights to make them floats.
#include "tile.h"

namespace mpsearch::MPSEARCH_ISA {

constexpr int kStripBlocks = 4;  // made floats at a time: 8 KB

// 2^15 has 8 bits left for a fraction, so its float with a code in bits 8 to 15 is 2^15 + code.
constexpr int32_t kOffsetBits = 0x47000000;
constexpr float kOffset = 32768;

// Codes of column k of a quad, + 2^15.
MPSEARCH_INLINE Lanes offset_codes(Bytes quad, int k) {
    const Ints rows = (Ints)quad;
    const Ints moved = k == 0 ? rows << 8 : rows >> (8 * (k - (k > 0)));
    return (Lanes)((moved & 0xff00) | kOffsetBits);
}

MPSEARCH_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512BW__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

MPSEARCH_INLINE Lanes broadcast_lanes(float value) {
    return value - Lanes{};
}

MPSEARCH_INLINE Lanes load_offset_zeros(const LinearJob& job, const uint8_t* record, int part) {
    const Ints doubled = load_doubled_zeros(record, job.half_scales, part);
    return __builtin_convertvector(doubled, Lanes) * 0.5f + kOffset;
}

template <int bits>
static void add_group(const LinearJob& job, int64_t tile, int64_t group, Lanes (&totals)[kVectors]) {
    const uint8_t* record = job.packed + (tile * job.n_groups + group) * record_bytes(job);
    const uint8_t* blocks = record + header_bytes(job.half_scales);
    const float* x = static_cast<const float*>(job.staged) + group * job.group_blocks * kBlockColumns;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const Lanes zeros = load_offset_zeros(job, record, v);
        Lanes sums[4] = {};
        for (int64_t b = 0; b < job.group_blocks; ++b) {
            Bytes quads[kQuads];
            unpack_quads<bits>(blocks + b * bits * kQuadBytes, v, quads);
#pragma GCC unroll 8
            for (int q = 0; q < kQuads; ++q)
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k)
                    sums[k] = multiply_add(offset_codes(quads[q], k) - zeros,
                                           broadcast_lanes(x[b * kBlockColumns + 4 * q + k]), sums[k]);
        }
        const Lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        totals[v] = multiply_add(sum, load_scales(record, job.half_scales, v), totals[v]);
    }
}

struct FloatProduct {
    static constexpr int kFew = 1, kTiles = 1;

    template <int bits, int tokens, int n>
    static void multiply_few(const LinearJob& job, int64_t begin, int64_t apart) {
        Lanes totals[n][kVectors] = {};
        for (int64_t group = 0; group < job.n_groups; ++group)
            for (int i = 0; i < n; ++i) add_group<bits>(job, begin + i * apart, group, totals[i]);
        for (int i = 0; i < n; ++i) store_rows(job, 0, begin + i * apart, totals[i]);
    }

    template <int bits, int tokens, int n>
    static void multiply_many(const LinearJob& job, int64_t tile) {
        Lanes weights[kStripBlocks * kBlockColumns][kVectors];
        Lanes totals[kMostTokens][kVectors];
        memset(totals, 0, job.n_token_blocks * tokens * sizeof(totals[0]));
        for (int64_t group = 0; group < job.n_groups; ++group) {
            const uint8_t* record = job.packed + (tile * job.n_groups + group) * record_bytes(job);
            const uint8_t* blocks = record + header_bytes(job.half_scales);
            for (int64_t begin = 0; begin < job.group_blocks; begin += kStripBlocks) {
                const int64_t left = job.group_blocks - begin, n_blocks = left < kStripBlocks ? left : kStripBlocks;
                for (int v = 0; v < kVectors; ++v) {
                    const Lanes zeros = load_offset_zeros(job, record, v);
                    const Lanes scales = load_scales(record, job.half_scales, v);
                    for (int64_t b = 0; b < n_blocks; ++b) {
                        Bytes quads[kQuads];
                        unpack_quads<bits>(blocks + (begin + b) * bits * kQuadBytes, v, quads);
#pragma GCC unroll 8
                        for (int q = 0; q < kQuads; ++q)
#pragma GCC unroll 4
                            for (int k = 0; k < 4; ++k)
                                weights[b * kBlockColumns + 4 * q + k][v] =
                                    (offset_codes(quads[q], k) - zeros) * scales;
                    }
                }
                for (int64_t block = 0; block < job.n_token_blocks; ++block) {
                    const float* x =
                        static_cast<const float*>(job.staged) +
                        ((group * job.n_token_blocks + block) * job.group_blocks + begin) * kBlockColumns * tokens;
                    Lanes total[tokens][kVectors];
                    memcpy(total, totals[block * tokens], sizeof(total));
                    for (int64_t q = 0; q < n_blocks * kQuads; ++q)
#pragma GCC unroll 4
                        for (int k = 0; k < 4; ++k)
#pragma GCC unroll 8
                            for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
                                for (int v = 0; v < kVectors; ++v)
                                    total[t][v] =
                                        multiply_add(weights[4 * q + k][v],
                                                     broadcast_lanes(x[4 * (q * tokens + t) + k]), total[t][v]);
                    memcpy(totals[block * tokens], total, sizeof(total));
                }
            }
        }
        for (int64_t token = 0; token < job.n_tokens; ++token) store_rows(job, token, tile, totals[token]);
    }
};

void linear(const LinearJob& job, int64_t begin, int64_t end) {
    walk_tiles<FloatProduct>(job, begin, end);
}

}  // namespace mpsearch::MPSEARCH_ISA
